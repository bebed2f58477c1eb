"""The repository's root is the package ``sparsary``, its folders the packages below; everything else is in pyproject.toml.

``[tool.setuptools.packages.find]`` cannot say this: it has no prefix to put before the names that it finds.
"""

from setuptools import find_packages, setup

folders = find_packages(
    include=[f"{layer}{below}" for layer in ("sae", "transcoders", "training", "eval") for below in ("", ".*")]
)
setup(
    packages=["sparsary", *(f"sparsary.{folder}" for folder in folders)],
    package_dir={"sparsary": "."},
    # Build front ends run this file under other names; by this one it is left out of the package in whose folder it lies.
    script_name="setup.py",
)
