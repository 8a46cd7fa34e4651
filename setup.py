"""Installation: floors of versions here, the tested versions in requirements.txt."""

import pathlib

import setuptools

setuptools.setup(
  name="tokenformer_jax",
  version="0.1.0",
  description="TokenFormer in JAX: attention over parameter tokens, and models that grow by adding them.",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=setuptools.find_packages(include=["tokenformer_jax", "tokenformer_jax.*"]),
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8",
    "etils[epath]>=1.13",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "huggingface_hub>=1.0",
    "importlib_resources",  # tensorflow-datasets imports it without asking for it.
    "jax>=0.10.2",
    "jaxtyping>=0.3.2",
    "matplotlib>=3.9",
    "ml_collections>=1.1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.21",
    "tqdm>=4.66",
  ],
  extras_require={
    "colab": ["ipykernel", "nbclient", "nbformat"],
    "eval": ["lm_eval>=0.4.13"],
    "gpu": ["jax[cuda12]"],
    "int8": ["qwix>=0.1.8"],
    "test": ["ipykernel", "nbclient", "nbformat", "pytest>=8", "pytest-xdist>=3.6", "qwix>=0.1.8"],
    "tpu": ["jax[tpu]"],
  },
)
