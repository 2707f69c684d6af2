"""Which packages there are; everything else is declared in pyproject.toml.

`launch` and `ds_configs` stand beside the library in the repository. Both names are taken on the package registry, so
an installed copy has them as `llamapro.launch` and `llamapro.ds_configs`.
"""

from setuptools import find_packages, setup

library = find_packages(include=["llamapro", "llamapro.*", "data_tools", "data_tools.*"])
beside = find_packages(include=["launch", "launch.*", "ds_configs"])

setup(
    packages=[*library, *(f"llamapro.{name}" for name in beside)],
    package_dir={"llamapro.launch": "launch", "llamapro.ds_configs": "ds_configs"},
)
