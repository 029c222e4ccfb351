"""Packaging read from settings.ini, the one place where the project is described."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def words(name: str) -> list[str]:
    return settings.get(name, "").split()


class WithData(build_py):
    """Puts data/ and the style of figures into the package that is built: a wheel has a copy, a clone has one data/."""

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / settings["lib_path"]
            shutil.copytree(here / "data", package / "data", dirs_exist_ok=True)
            shutil.copy(here / "matplotlibrc", package)


setup(
    cmdclass={"build_py": WithData},
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
    ],
    python_requires=">=" + settings["min_python"],
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    install_requires=words("requirements"),
    extras_require={name: words(f"{name}_requirements") for name in ("models", "pipeline", "lmms", "dev")},
    entry_points={
        "console_scripts": words("console_scripts"),
        "papermill.engine": ["w2r2=w2r2.engine:StableEngine"],
        "nbdev": ["w2r2=w2r2._modidx:d"],
    },
    zip_safe=False,
)
