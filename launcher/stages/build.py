"""Build: the image on this machine, when its recipe has changed or it is not there; otherwise nothing."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from cluster.dockerd import DockerEngine
from cluster.errors import ImageError
from cluster.inventory import ImageRecipe
from launcher import image

Tell = Callable[[image.Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe with everything read that decides what the image will hold; `tag` is its fingerprint's."""

    tag: str
    entries: tuple[image.Entry, ...]
    arguments: Mapping[str, str]
    labels: Mapping[str, str]
    network: str | None
    base: str | None
    mirror: str | None


def read_recipe(asked: ImageRecipe, flavour: image.Flavour) -> Recipe:
    """Read what an image is made of. Cheap: an unchanged recipe must cost nothing."""
    recipe = _recipe(asked, flavour)
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


def _recipe(asked: ImageRecipe, flavour: image.Flavour) -> image.Recipe:
    return image.Recipe(
        flavour=flavour,
        base=asked.base,
        ca_bundle=asked.ca_bundle,
        pip_index=asked.pip_index,
        wheels=asked.wheels,
        apt_mirror=asked.apt_mirror,
        cuda_architectures=asked.cuda_architectures,
    )


def build_image(engine: DockerEngine, recipe: Recipe, tell: Tell) -> str:
    """Build what is not there; gives back the digest. The tag appears only when everything has been proven."""
    found = engine.image_id(recipe.tag)
    if found is not None:
        return found
    base = _base(engine, recipe, tell)
    progress = image.Progress()

    def hear(message: Mapping[str, object]) -> None:
        nonlocal progress
        progress = image.read_progress(message, after=progress)
        tell(progress)

    with tempfile.TemporaryFile() as context:
        image.write_context(recipe.entries, cast("BinaryIO", context))
        context.seek(0)
        return engine.build(
            cast("BinaryIO", context),
            tag=recipe.tag,
            arguments={**recipe.arguments, "BASE": base},
            labels=recipe.labels,
            network=recipe.network,
            tell=hear,
        )


def _base(engine: DockerEngine, recipe: Recipe, tell: Tell) -> str:
    """The base image: the one that was asked for, the default if it can be had, else one of Debian packages."""
    wanted = recipe.base or image.DEFAULT_BASE
    if engine.image_id(wanted) or engine.pull(wanted):
        return wanted
    if recipe.base:
        raise ImageError(
            engine.node,
            f"the base image {recipe.base} is not there and cannot be pulled",
            next_step="docker load it on this machine, name another one, or leave image.base out",
        )
    script = image.context_folder() / "base.sh"
    made = image.base_tag(script.read_bytes())
    if engine.image_id(made) is None:
        tell(image.Progress(instruction="base image from Debian packages: no registry can be reached"))
        _make_base(engine, script, made, recipe.mirror)
    return made


def _make_base(engine: DockerEngine, script: Path, tag: str, mirror: str | None) -> None:
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
