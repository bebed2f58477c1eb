"""The repository's root is the package ``sparsary``, its folders the packages below; everything else is in pyproject.toml."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

folders = find_packages(
    include=[f"{layer}{below}" for layer in ("sae", "transcoders", "training", "eval") for below in ("", ".*")]
)


class BuildPackage(build_py):
    """Build the package without this file, which stands in its folder."""

    def find_package_modules(self, package, package_dir):
        """Return the modules of a package, as (package, module, path)."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    packages=["sparsary", *(f"sparsary.{folder}" for folder in folders)],
    package_dir={"sparsary": "."},
    cmdclass={"build_py": BuildPackage},
)
