"""Prints what is in the image: every Debian and Python package, as a CycloneDX 1.6 document (cyclonedx.org).

The same packages give the same bytes: no time, no serial number.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import quote


def debian() -> Iterator[dict[str, object]]:
    """Packages that dpkg knows, with their source package as a property."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line.count("=") == 1
    )
    vendor = release.get("ID", "debian").strip('"')
    fields = "${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
    listed = subprocess.run(["dpkg-query", "--show", "-f", fields], text=True, capture_output=True, check=True)
    for line in listed.stdout.splitlines():
        name, version, architecture, source = line.split("\t")
        purl = f"pkg:deb/{vendor}/{quote(name)}@{quote(version)}?arch={architecture}"
        yield component(name, version, purl, source=source)


def python() -> Iterator[dict[str, object]]:
    """Distributions of the environment, with the licence that they state."""
    for each in metadata.distributions():
        name = each.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        found = component(name, each.version, f"pkg:pypi/{quote(name)}@{quote(each.version)}")
        if expression := each.metadata.get("License-Expression"):
            found["licenses"] = [{"expression": expression}]
        yield found


def component(name: str, version: str, purl: str, *, source: str = "") -> dict[str, object]:
    """One package in the words of CycloneDX."""
    found: dict[str, object] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if source and source != name:
        found["properties"] = [{"name": "launcher:source", "value": source}]
    return found


def main() -> None:
    """Print the document."""
    components = {str(each["purl"]): each for each in (*debian(), *python())}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "image", "name": "launcher"}},
        "components": [components[purl] for purl in sorted(components)],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
