"""Images: every kind of source, batches that depend on the seed and the sample's number alone, and what is refused."""

import dataclasses
import gzip
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from tokenformer_jax.config import Config, DataConfig, ImagesConfig, ModelConfig
from tokenformer_jax.config.task import VisionConfig
from tokenformer_jax.data import augmentation
from tokenformer_jax.data.image_dataset import open_image_data
from tokenformer_jax.data.image_sources import open_images
from tokenformer_jax.data.mixing import mix
from tokenformer_jax.data.spec import parse_sources

CLASSES = ("ant", "bee", "cat")
VISION = VisionConfig(image_size=8, patch_size=4, channels=1, num_classes=3)
LABELS = np.arange(20) % 3
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
EVERY_CHANGE = ImagesConfig(
  shift=1, smallest_crop=0.5, flip=True, randaugment=2, mixup=0.8, cutmix=1.0, label_smoothing=0.1
)


def idx(array):
  head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
  return head + array.astype(np.uint8).tobytes()


def png(pixels):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The same twenty images as idx files, in two forms of npz, and as PNG files in folders of classes."""
  root = tmp_path_factory.mktemp("images")
  for name, count in (("train", 20), ("t10k", 7)):
    (root / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS[:count])))
    (root / f"{name}-labels-idx1-ubyte").write_bytes(idx(LABELS[:count]))
  np.savez(root / "pixels.npz", images=PIXELS[..., None], labels=LABELS, class_names=CLASSES)
  files = [png(pixels) for pixels in PIXELS]
  encoded = dict(jpeg_bytes=np.frombuffer(b"".join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]))
  np.savez(root / "files.npz", labels=LABELS.astype(np.uint8), **encoded)
  for number, (file, label) in enumerate(zip(files, LABELS)):
    path = root / "classes" / CLASSES[label] / f"{number:02}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file)
  return root


def spec(kind, folder):
  rest = {"pixels": "npz:{}/pixels.npz", "files": "npz:{}/files.npz", "folder": "folder:{}/classes", "idx": "idx:{}"}
  return rest[kind].format(folder)


def opened(source, folder, held_out=None, vision=VISION, process=(0, 1), batch_size=8, seed=0, **images):
  config = DataConfig(
    source=source,
    held_out_source=f"idx:{folder}@test" if held_out is None else held_out,
    batch_size=batch_size,
    seed=seed,
    images=ImagesConfig(**images),
  )
  return open_image_data(config, vision, process_index=process[0], process_count=process[1])


def taken(batches, count):
  return list(itertools.islice(batches, count))


@pytest.mark.parametrize("kind", ["idx", "pixels", "files", "folder"])
def test_every_kind_of_source_gives_the_same_images_and_labels(kind, folder):
  source = open_images(parse_sources(spec(kind, folder))[0])
  read = [source.read(row) for row in range(source.length)]
  order = np.argsort(LABELS, kind="stable") if kind == "folder" else np.arange(20)
  np.testing.assert_array_equal([np.asarray(image) for image, _ in read], PIXELS[order])
  assert [label for _, label in read] == LABELS[order].tolist() and source.num_classes == 3
  assert source.classes == (CLASSES if kind in ("pixels", "folder") else ())


def test_tensorflow_datasets_are_read_at_random(folder, tmp_path, monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets")

  class LocalPhotos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(names=CLASSES)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      paths = sorted((folder / "classes").glob("*/*.png"))
      return {"train": ((i, dict(image=str(path), label=path.parent.name)) for i, path in enumerate(paths))}

    def _generate_examples(self):
      raise NotImplementedError

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  LocalPhotos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  source = open_images(parse_sources("tfds:local_photos@train[:10]")[0])
  assert (source.length, source.classes) == (10, CLASSES)
  found = [(np.asarray(image).tobytes(), label) for image, label in map(source.read, range(10))]
  assert set(found) <= {(pixels.tobytes(), label) for pixels, label in zip(PIXELS, LABELS.tolist())}
  assert len(set(found)) == 10


def test_an_epoch_has_every_image_once_and_a_held_out_set_all_of_them(folder):
  data = opened(spec("idx", folder), folder, batch_size=4, mean=(0.25,), std=(0.5,))
  inputs = np.concatenate([batch.inputs for batch in taken(data.train_batches(), 10)])
  expected = (PIXELS[..., None] / 255 - 0.25) / 0.5
  # Numbers are compared by their whole images, in both epochs.
  distances = np.abs(inputs[:, None] - expected[None]).max(axis=(2, 3, 4))
  found = distances.argmin(axis=1)
  assert distances.min(axis=1).max() < 1e-6
  assert sorted(found[:20]) == sorted(found[20:]) == list(range(20)) and list(found[:20]) != list(found[20:])
  held_out = list(data.named_held_out_batches()["held_out"])
  assert [batch.weights.tolist() for batch in held_out] == [[1, 1, 1, 1], [1, 1, 1, 0]]
  counted = sum(batch.weights @ batch.labels for batch in held_out)
  np.testing.assert_array_equal(counted, np.bincount(LABELS[:7]))
  assert len(list(data.named_held_out_batches(1)["held_out"])) == 1


def test_batches_depend_on_the_seed_and_the_number_of_the_sample_alone(folder):
  """Also with every random change: shares of two processes are one batch, and a position gives the batches after it."""
  changes = dataclasses.asdict(EVERY_CHANGE)
  source = spec("folder", folder)
  whole = taken(opened(source, folder, **changes).train_batches(), 3)
  halves = [taken(opened(source, folder, process=(i, 2), **changes).train_batches(), 3) for i in range(2)]
  for batch, left, right in zip(whole, *halves):
    for a, b, c in zip(batch, left, right):
      assert a is None or np.array_equal(a, np.concatenate([b, c]))
  resumed = opened(source, folder, **changes).train_batches()
  resumed.set_state({"next_batch": 2})
  np.testing.assert_array_equal(next(resumed).inputs, whole[2].inputs)
  other = next(opened(source, folder, seed=1, **changes).train_batches())
  assert not np.array_equal(other.inputs, whole[0].inputs)
  np.testing.assert_allclose(whole[0].labels.sum(axis=1), 1, rtol=1e-6)
  assert np.all(whole[0].labels >= np.float32(0.1) / 3 - 1e-6)


def test_what_is_held_out_is_never_trained_on(folder):
  data = opened(spec("idx", folder), folder, held_out="", batch_size=2)
  names = {batch.inputs[i].tobytes() for batch in taken(data.train_batches(), 30) for i in range(2)}
  held_out = {
    b.inputs[i].tobytes() for b in data.named_held_out_batches()["held_out"] for i in range(2) if b.weights[i]
  }
  assert held_out and not names & held_out and len(names) + len(held_out) == 20


@pytest.mark.parametrize("choice", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_shares_of_the_pixels(choice):
  config, shares = ImagesConfig(**{choice: 1.0}), []
  for seed in range(20):
    images = np.stack([np.zeros((16, 16, 1)), np.ones((16, 16, 1))]).astype(np.float32)
    labels = np.eye(2, dtype=np.float32)
    mix(images, labels, config, np.random.default_rng(seed))
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), labels[:, 1], atol=1e-6)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    shares.append(labels[0, 0])
    assert (choice == "mixup") == (len(np.unique(images[0])) == 1)
  assert np.std(shares) > 0.15


def test_images_are_resized_cropped_moved_and_mirrored():
  ramp = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1)))  # 24 wide, 16 high.
  centre = augmentation.pixels_of(ramp, 8, 1, ImagesConfig(resize=16), None)[..., 0]
  # The columns 8 to 15 of the ramp: 8 pixels at the centre of a shorter side of 16.
  np.testing.assert_array_equal(centre, np.tile(np.arange(80, 160, 10), (8, 1)))
  colours = augmentation.pixels_of(ramp.crop((0, 0, 8, 8)), 8, 3, ImagesConfig(), None)
  assert colours.shape == (8, 8, 3) and np.ptp(colours, axis=2).max() == 0
  white = Image.fromarray(np.full((8, 8), 255, np.uint8))
  moved = set()
  for seed in range(300):
    image = augmentation.pixels_of(white, 8, 1, ImagesConfig(shift=2), np.random.default_rng(seed))[..., 0] > 0
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    moved.add((int(rows[0] + rows[-1] - 7), int(columns[0] + columns[-1] - 7)))
  assert moved == set(itertools.product(range(-2, 3), range(-2, 3)))
  square = ramp.crop((0, 0, 8, 8))
  sides = {
    augmentation.pixels_of(square, 8, 1, ImagesConfig(flip=True), np.random.default_rng(i)).tobytes() for i in range(9)
  }
  assert sides == {np.asarray(square).tobytes(), np.asarray(square)[:, ::-1].tobytes()}


def test_random_crops_have_the_areas_and_ratios_asked_for():
  for seed in range(200):
    left, top, right, bottom = augmentation.random_crop((60, 40), 0.25, np.random.default_rng(seed))
    width, height = right - left, bottom - top
    assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
    assert width * height >= 0.25 * 2400 * 0.9 and 0.7 < width / height < 1.43  # Sides are whole numbers.
  assert augmentation.random_crop((90, 10), 1.0, np.random.default_rng(0)) == pytest.approx(
    (38.33, 0, 51.67, 10), abs=0.01
  )


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_randaugment_changes_images_and_keeps_their_size(channels):
  pixels = np.random.default_rng(0).integers(60, 180, (24, 24, 3), np.uint8)
  image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
  unchanged = []
  for number, operation in enumerate(augmentation._OPERATIONS):
    changed = operation(image, 0.9, 1, 128 if channels == 1 else (128,) * 3)
    assert (changed.size, changed.mode) == (image.size, image.mode)
    unchanged += [number] * np.array_equal(changed, image)
  assert unchanged == ([6] if channels == 1 else [])  # A grey image has no colour.


def test_an_image_that_cannot_be_read_stops_the_run_or_is_left_out_and_counted(tmp_path, folder):
  for number, name in enumerate(CLASSES):
    (tmp_path / name).mkdir()
    (tmp_path / name / "good.png").write_bytes(png(PIXELS[number]))
  broken = tmp_path / "bee" / "broken.png"
  broken.write_bytes(png(PIXELS[0])[:-30])
  source = f"folder:{tmp_path}"
  with pytest.raises(ValueError, match=rf"{broken} cannot be read as an image \(.*\): remove it, or choose .*=skip"):
    taken(opened(source, folder, batch_size=4).train_batches(), 1)
  data = opened(source, folder, batch_size=4, bad_image="skip", mixup=1.0)
  batches = taken(data.train_batches(), 3)
  assert [batch.weights.sum() for batch in batches] == [3, 3, 3] and data.skipped == 1
  assert all(np.all(np.abs(batch.inputs[batch.weights == 0] + 1) < 1e-6) for batch in batches)


def _npz(path, **arrays):
  np.savez(path, **arrays)
  return f"npz:{path}"


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda f, t: opened("text:a.txt", f),
      "source text:a.txt holds texts, and the model reads images: give one of idx",
    ),
    (lambda f, t: opened(f"idx:{f}@dev", f), "split 'dev' is unknown; choose train or test"),
    (lambda f, t: opened(f"idx:{t}", f), r"train-images-idx3-ubyte\[.gz\] does not exist"),
    (lambda f, t: opened(f"npz:{t}/none.npz", f), "none.npz cannot be read .*No such file"),
    (lambda f, t: opened(_npz(f"{t}/a.npz", images=PIXELS), f), "a.npz has no array 'labels'; it has images"),
    (lambda f, t: opened(_npz(f"{t}/b.npz", images=PIXELS, labels=LABELS[1:]), f), r"labels are int64\[19\]; .* of 20"),
    (
      lambda f, t: opened(_npz(f"{t}/c.npz", images=PIXELS / 255, labels=LABELS), f),
      r"images are float64\[20, 8, 8\]; exp",
    ),
    (lambda f, t: opened(_npz(f"{t}/d.npz", images=PIXELS, labels=LABELS - 1), f), "not negative, for each"),
    (lambda f, t: opened(f"folder:{t}", f), "has no folders; expected one for each class"),
    (lambda f, t: opened(f"folder:{t}/no", f), "no is no folder"),
    (
      lambda f, t: opened(f"idx:{f}", f, vision=dataclasses.replace(VISION, num_classes=2)),
      "label 2 is out of range for model.vision.num_classes=2; set it to 3",
    ),
    (
      lambda f, t: opened(f"idx:{f}", f, vision=dataclasses.replace(VISION, channels=2)),
      "model.vision.channels=2: images are read with 1 or 3 channels",
    ),
    (
      lambda f, t: taken(opened(f"idx:{f}", f, vision=dataclasses.replace(VISION, image_size=12)).train_batches(), 1),
      "idx:.* image [0-9]+ is 8 × 8, and the model reads 12 × 12: set data.images.resize",
    ),
    (
      lambda f, t: opened(f"idx:{f}", f, batch_size=6, process=(0, 2), mixup=1.0),
      "batch_size=6: its images, which mixup",
    ),
  ],
)
def test_mistakes_are_named_in_one_line(make, message, folder, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    make(folder, tmp_path)
  assert "\n" not in str(error.value)


def test_files_that_break_off_are_named(folder, tmp_path):
  for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
    path = next(path for path in (folder / f"{name}.gz", folder / name) if path.exists())
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS)[:-1])
  with pytest.raises(ValueError, match="train-labels-idx1-ubyte is no idx file of 1 axes of bytes, or it breaks off"):
    opened(f"idx:{tmp_path}", folder)
  images = tmp_path / "train-images-idx3-ubyte.gz"
  images.write_bytes(images.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r"ubyte.gz cannot be read \("):
    opened(f"idx:{tmp_path}", folder)


def test_a_class_that_is_missing_does_not_move_the_labels(folder, tmp_path):
  for name in ("ant", "cat"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").write_bytes(png(PIXELS[0]))
  train = spec("folder", folder)
  with pytest.raises(ValueError, match=f"source folder:{tmp_path} lacks the class 'bee', so its labels would not be"):
    opened(train, folder, held_out=f"folder:{tmp_path}")
  (tmp_path / "bee").mkdir()
  (batch,) = opened(train, folder, held_out=f"folder:{tmp_path}").named_held_out_batches()["held_out"]
  np.testing.assert_array_equal(batch.weights @ batch.labels, [1, 0, 1])


def test_fields_for_what_a_model_does_not_read_are_refused():
  images = ModelConfig.named("tiny", "vit")
  for model, data, message in (
    (images, DataConfig(packing="documents"), "data.packing='documents': is for texts"),
    (images, DataConfig(images=ImagesConfig(std=(0.2, 0.3))), "data.images.std=.*vision.channels=3 numbers"),
    (
      images,
      DataConfig(images=ImagesConfig(resize=200)),
      "data.images.resize=200: must be at least vision.image_size=224",
    ),
    (ModelConfig.named("tiny"), DataConfig(images=ImagesConfig(flip=True)), "data.images.flip=True: is for images"),
  ):
    with pytest.raises(ValueError, match=message):
      Config(model=model, data=data)
  config = Config(model=images, data=DataConfig(images=ImagesConfig(mean=(1, 0.5, 0))))
  assert Config.from_dict(config.to_config_dict()) == config and config.data.images.mean == (1.0, 0.5, 0.0)
  with pytest.raises(ValueError, match=r"mean=\('a',\): expected a tuple of finite numbers"):
    ImagesConfig(mean=("a",))
