"""Installation: lower bounds of versions are here, the tested versions in requirements.txt."""

import pathlib

import setuptools

_NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]

setuptools.setup(
  name="tokenformer_jax",
  version="0.1.0",
  description="TokenFormer in JAX: attention over parameter tokens, and models that grow by adding them.",
  long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=setuptools.find_packages(include=["tokenformer_jax", "tokenformer_jax.*"]),
  package_data={
    "tokenformer_jax": ["py.typed"],  # Type checkers read the annotations of packages that have this file.
    "tokenformer_jax.atlas": ["page.html"],
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8",  # tensorflow-datasets requires it only on Linux, for file_format="array_record".
    "etils[epath]>=1.13",
    "flax>=0.12.8",
    "fsspec>=2024.6",
    "grain>=0.2.18",
    "huggingface_hub>=1.0",
    "importlib_resources",  # tensorflow-datasets imports it without requiring it.
    "jax>=0.10.2",
    "jaxtyping>=0.3.2",
    "matplotlib>=3.9",
    "ml_collections>=1.1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",  # growth/stream.py uses internals, which tests/test_orbax_internals.py lists.
    "pillow>=11",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.74",
    "tokenizers>=0.21",
    "tqdm>=4.66",
  ],
  extras_require={
    "colab": _NOTEBOOKS,
    # The formatter's style differs between minor versions, so its version is bounded.
    "dev": ["build>=1.2", "mypy>=1.18", "pre-commit>=4.0", "ruff>=0.17,<0.18"],
    "docs": ["furo>=2025.12", "myst-parser>=5.0", "sphinx>=9.0"],
    "eval": ["lm_eval>=0.4.13", "scikit-learn>=1.5", "scipy>=1.13"],
    "gcs": ["etils[epath-gcs]>=1.13"],
    "gpu": ["jax[cuda12]"],
    "int8": ["qwix>=0.1.8"],
    # safetensors, scikit-learn and scipy are references for comparison.
    "test": [
      *_NOTEBOOKS,
      "hypothesis>=6.100",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "pyyaml>=6.0",
      "qwix>=0.1.8",
      "safetensors>=0.5",
      "scikit-learn>=1.5",
      "scipy>=1.13",
      "zstandard>=0.22",
    ],
    "tpu": ["jax[tpu]"],
    "wandb": ["wandb>=0.19"],
    "zstd": ["zstandard>=0.22"],
  },
)
