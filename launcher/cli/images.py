"""Images at hand: image ship, save, load, ls, prune, why."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import ClusterError
from launcher.cli.config import image
from launcher.cli.options import cluster_option, json_option, load, memory, opened, show_json

if TYPE_CHECKING:
    from cluster.shelf import Shelf
    from launcher.images import Listing

FILE = click.Path(dir_okay=False, path_type=Path)


@image.command("ship")
@cluster_option
@click.argument("name", metavar="IMAGE")
@json_option
def image_ship(cluster: str | None, name: str, *, as_json: bool) -> None:
    """Bring an image of this machine to every node that lacks it, as `up` does; only missing layers travel.

    \b
    launcher image ship registry.example:5000/ml/eval:3
    """
    from cluster.allowed import check_image
    from launcher import images

    with opened(cluster) as now:
        digest, sent = images.ship_named(now, check_image(name))
    if as_json:
        show_json({"image": name, "digest": digest, "sent": dict(sent)})
    else:
        told = ", ".join(f"{node} {taken / 1e6:.1f} MB" for node, taken in sent.items())
        click.echo(f"{name}: {told or 'every node has it'}", err=True)


@image.command("save")
@cluster_option
@click.argument("file", type=FILE)
@click.argument("name", required=False, metavar="[IMAGE]")
@json_option
def image_save(cluster: str | None, file: Path, name: str | None, *, as_json: bool) -> None:
    """Write an image of this machine into a file, compressed and verified; without IMAGE the cluster's own.

    For sites without a network: `launcher image load` takes it there, and so does `docker load`.

    \b
    launcher image save image.tar
    """
    from cluster.allowed import check_image
    from launcher import converge, images
    from launcher.session import showing
    from launcher.views.live import Teller

    name = converge.image_tag(load(cluster)[0]) if name is None else check_image(name)
    teller = Teller()
    with showing(teller):
        digest = images.save(
            _shelf(), file, name=name, progress=lambda done, total: teller.shipping(str(file), done, total)
        )
    if as_json:
        show_json({"image": name, "digest": digest, "file": str(file), "bytes": file.stat().st_size})
    else:
        click.echo(f"{file}: {name}, {file.stat().st_size / 1e6:.0f} MB", err=True)


@image.command("load")
@click.argument("file", type=FILE)
@json_option
def image_load(file: Path, *, as_json: bool) -> None:
    """Take an image of a file into this machine's engine, after all of it was verified.

    \b
    launcher image load image.tar
    """
    from launcher import images
    from launcher.session import showing
    from launcher.views.live import Teller

    teller = Teller()
    with showing(teller):
        digest, names = images.load(file, progress=lambda done, total: teller.shipping(str(file), done, total))
    if as_json:
        show_json({"digest": digest, "names": list(names), "file": str(file)})
    else:
        click.echo(f"{', '.join(names) or digest} is here", err=True)


@image.command("ls")
@cluster_option
@json_option
def image_ls(cluster: str | None, *, as_json: bool) -> None:
    """Our images on every machine, and who lacks the one that the inventory asks for.

    \b
    launcher image ls
    """
    from launcher import images
    from launcher.views import text

    with opened(cluster) as now:
        found = images.listing(now, wanted=_wanted())
    if as_json:
        show_json(_as_data(found))
        return
    click.echo(text.table([("machine", "image", "digest", "size", "state"), *images.table(found)]))


@image.command("prune")
@cluster_option
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def image_prune(cluster: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Remove our images that no container uses and no known cluster asks for, and what broken transfers left.

    \b
    launcher image prune --dry-run
    """
    from launcher import images

    with opened(cluster) as now:
        before, gone, freed = images.prune(now, wanted=_wanted(), dry_run=dry_run)
    if as_json:
        told = [{"machine": one.machine, "image": one.name, "digest": one.held.id} for one in gone]
        show_json({"dry_run": dry_run, "gone": told, "shelf": freed, "silent": sorted(before.silent)})
        return
    for one in gone:
        click.echo(f"{one.machine}: {'would remove' if dry_run else 'removed'} {one.name} ({one.held.id[7:19]})")
    for error in before.silent.values():
        click.echo(f"warning: {error}", err=True)
    if not gone:
        click.echo("nothing to remove", err=True)


@image.command("why")
@cluster_option
@click.argument("name", required=False, metavar="[IMAGE]")
@json_option
def image_why(cluster: str | None, name: str | None, *, as_json: bool) -> None:
    """Why the recipe makes another image than the newest one that is there, or than IMAGE.

    \b
    launcher image why
    """
    from cluster.allowed import check_image
    from launcher import images

    with opened(cluster) as now:
        said = images.why(now, against=name if name is None else check_image(name))
    if as_json:
        show_json(
            {
                "image": said.tag,
                "present": said.present,
                "before": said.before or None,
                "machine": said.machine or None,
                "changes": list(said.changes),
            }
        )
        return
    click.echo(f"{said.tag} {'is there' if said.present else 'has to be built'}")
    if said.before:
        click.echo(f"compared with {said.before} on {said.machine}:")
    for line in said.changes or (("  nothing changed",) if said.before else ("  there is no other one",)):
        click.echo(f"  {line.strip()}")


def _shelf() -> Shelf:
    from cluster.shelf import Shelf

    return Shelf(memory().shelf)


def _wanted() -> set[str]:
    """The images that the clusters ask for which are known here: another cluster's is no rubbish."""
    from cluster.inventory import load_inventory
    from launcher.converge import image_tags

    names: set[str] = set()
    for known in memory().clusters():
        with suppress(ClusterError):
            if path := known.inventory():
                names.update(image_tags(load_inventory(path, engine=known.engine())))  # type: ignore[arg-type]
    return names


def _as_data(found: Listing) -> dict[str, Any]:
    from launcher.images import state

    return {
        "image": found.tag,
        "images": [
            {
                "machine": one.machine,
                "names": list(one.held.tags),
                "digest": one.held.id,
                "bytes": one.held.size,
                "created": one.held.created,
                "state": state(one),
            }
            for one in found.images
        ],
        "lacks": dict(found.lacks),
        "silent": {name: error.what for name, error in found.silent.items()},
    }
