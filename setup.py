"""The repository's root is the package ``sparsary``, its folders the packages below; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

folders = find_packages(
    include=[f"{layer}{below}" for layer in ("sae", "transcoders", "training", "eval") for below in ("", ".*")]
)
setup(packages=["sparsary", *(f"sparsary.{folder}" for folder in folders)], package_dir={"sparsary": "."})
