"""Package layout: the repository root is the package ``sparsary``, its folders are subpackages; the rest is in pyproject.toml.

``[tool.setuptools.packages.find]`` cannot express this, since it cannot add a prefix to the package names it finds.
"""

from setuptools import find_packages, setup

folders = find_packages(
    include=[f"{layer}{below}" for layer in ("sae", "transcoders", "training", "eval") for below in ("", ".*")]
)
setup(
    packages=["sparsary", *(f"sparsary.{folder}" for folder in folders)],
    package_dir={"sparsary": "."},
    # Build front ends run this file under other names; setuptools excludes it from the root package only under this name.
    script_name="setup.py",
)
