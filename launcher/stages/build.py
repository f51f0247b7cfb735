"""Build: the image by an engine, here or on a node, when its recipe has changed or it is not there; otherwise nothing.

What the user wants on top (`launcher.layer`) is an image of its own, built on ours.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from cluster.dockerd import UNAME, DockerEngine, context_files
from cluster.errors import ImageError
from cluster.inventory import ImageRecipe
from launcher import image, layer

Tell = Callable[[image.Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe with everything read that decides what the image will hold; `tag` is its fingerprint's.

    `under` is the recipe of the image that it stands on, where that is one of ours.
    """

    tag: str
    entries: tuple[image.Entry, ...]
    arguments: Mapping[str, str]
    labels: Mapping[str, str]
    network: str | None
    base: str | None
    mirror: str | None
    under: Recipe | None = None
    dockerfile: str = "Dockerfile"
    folders: tuple[str, ...] = ("ca", "wheels")

    @property
    def tags(self) -> tuple[str, ...]:
        """Its image's name, and that of the image below."""
        return (self.tag, *(self.under.tags if self.under else ()))


def read_recipe(asked: ImageRecipe, flavour: image.Flavour) -> Recipe:
    """Read what an image is made of. Cheap: an unchanged recipe must cost nothing."""
    recipe = _recipe(asked, flavour)
    base = _read_base(asked, recipe)
    wanted = layer.Layer(
        packages=asked.packages, requirements=asked.requirements, apt=asked.apt, dockerfile=asked.dockerfile
    )
    return _read_layer(wanted, recipe, base) if wanted else base


def _read_base(asked: ImageRecipe, recipe: image.Recipe) -> Recipe:
    folder = image.context_folder()
    entries = image.load_context(folder, recipe)
    arguments = image.build_arguments(recipe)
    digest = image.fingerprint(entries, arguments)
    return Recipe(
        tag=image.tag(recipe.flavour, digest),
        entries=entries,
        arguments=arguments,
        labels=image.labels(recipe.flavour, digest, image.parts(entries, arguments)),
        network=None if asked.build_network == "default" else asked.build_network,
        base=asked.base,
        mirror=asked.apt_mirror,
    )


def _read_layer(wanted: layer.Layer, recipe: image.Recipe, base: Recipe) -> Recipe:
    if wanted.dockerfile is None:
        entries = layer.load_packages(image.context_folder(), wanted, flavour=recipe.flavour, wheels=recipe.wheels)
    else:
        folder = wanted.dockerfile.parent
        files = context_files(folder, wanted.dockerfile.name) if folder.is_dir() else ()
        entries = layer.load_dockerfile(wanted, files)
    arguments = layer.arguments(recipe)
    digest = image.fingerprint(entries, arguments, base_id=base.tag)
    parts = layer.parts(image.read_parts(base.labels) or {}, wanted, entries, arguments)
    return replace(
        base,
        tag=layer.tag(base.tag, digest),
        entries=entries,
        arguments=arguments,
        labels={**image.labels(recipe.flavour, digest, parts), layer.BASE: base.tag},
        under=base,
        dockerfile=wanted.dockerfile.name if wanted.dockerfile else "Dockerfile",
        folders=() if wanted.dockerfile else ("wheels",),
    )


def _recipe(asked: ImageRecipe, flavour: image.Flavour) -> image.Recipe:
    return image.Recipe(
        flavour=flavour,
        base=asked.base,
        ca_bundle=asked.ca_bundle,
        pip_index=asked.pip_index,
        wheels=asked.wheels,
        apt_mirror=asked.apt_mirror,
        cuda_architectures=asked.cuda_architectures,
        toolkit=asked.toolkit,
    )


def build_image(engine: DockerEngine, recipe: Recipe, tell: Tell) -> str:
    """Build what is not there; gives back the digest. The tag appears only when everything has been proven."""
    found = engine.image_id(recipe.tag)
    if found is not None:
        return found
    if recipe.under is None:
        base = _base(engine, recipe, tell)
    else:
        build_image(engine, recipe.under, tell)
        base = recipe.under.tag
    progress = image.Progress()

    def hear(message: Mapping[str, object]) -> None:
        nonlocal progress
        progress = image.read_progress(message, after=progress)
        tell(progress)

    with tempfile.TemporaryFile() as context:
        image.write_context(recipe.entries, cast("BinaryIO", context), folders=recipe.folders)
        context.seek(0)
        try:
            return engine.build(
                cast("BinaryIO", context),
                dockerfile=recipe.dockerfile,
                tag=recipe.tag,
                arguments={**recipe.arguments, "BASE": base},
                labels=recipe.labels,
                network=recipe.network,
                tell=hear,
            )
        except ImageError as error:
            cure = layer.cure(error.detail) if recipe.under else None
            if cure is None:
                raise
            raise ImageError(error.node, error.what, detail=error.detail, next_step=cure) from error


def _base(engine: DockerEngine, recipe: Recipe, tell: Tell) -> str:
    """The base image: the one that was asked for, the default if it can be had, else one of Debian packages."""
    wanted = recipe.base or image.DEFAULT_BASE
    if engine.image_id(wanted) or engine.pull(wanted):
        return wanted
    if recipe.base:
        raise ImageError(
            engine.node,
            f"the base image {recipe.base} is not there and cannot be pulled",
            next_step="docker load it there, name another one, or leave image.base out",
        )
    script = image.context_folder() / "base.sh"
    made = image.base_tag(script.read_bytes())
    if engine.image_id(made) is None:
        tell(image.Progress(instruction="base image from Debian packages: no registry can be reached"))
        _make_base(engine, script, made, recipe.mirror)
    return made


def _make_base(engine: DockerEngine, script: Path, tag: str, mirror: str | None) -> None:
    """Make it here, whichever engine takes it in."""
    theirs, ours = engine.architecture(), platform.machine()
    if theirs != UNAME.get(ours, ours):
        raise ImageError(
            engine.node,
            f"no base image can be pulled, and this machine ({ours}) can make none for {theirs}",
            next_step="docker load one there, and name it under image.base",
        )
    argv = ["sh", str(script), *(["--mirror", mirror] if mirror else [])]
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as rootfs:
        # Whole before it is imported: an archive that broke off would make an image too.
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=rootfs, stderr=said, check=False)
        if done.returncode != 0:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise ImageError(
                engine.node, "no base image can be pulled, and none made of Debian packages", detail=tuple(lines[-4:])
            )
        rootfs.seek(0)
        engine.import_base(cast("BinaryIO", rootfs), tag=tag)
