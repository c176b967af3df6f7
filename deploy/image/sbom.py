"""What is in an image, as a CycloneDX document: Python's packages and Debian's.

    python sbom.py VENV/bin/python DPKG_STATUS OUTPUT

Python's come from cyclonedx-bom, the reference tool, which knows environments only; Debian's are
added from dpkg's own list. The result is checked against CycloneDX's schema.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

SPEC = "1.6"


def python_packages(interpreter: str) -> dict[str, Any]:
    """The document of a virtual environment."""
    tool = str(Path(sys.executable).with_name("cyclonedx-py"))
    command = [tool, "environment", "--output-reproducible", "--spec-version", SPEC, interpreter]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def debian_packages(status: str) -> list[dict[str, str]]:
    """Components of the installed packages in dpkg's status file."""
    components = []
    for paragraph in status.strip().split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if line[:1].isalpha())
        fields = {name: value for name, _, value in lines}
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={fields['Architecture']}"
            components.append(
                {
                    "type": "library",
                    "bom-ref": purl,
                    "name": name,
                    "version": version,
                    "purl": purl,
                }
            )
    return components


def main(interpreter: str, status: str, output: str) -> None:
    """Write the document. Exits with a message when it is not valid."""
    document = python_packages(interpreter)
    document["components"] += debian_packages(Path(status).read_text())
    text = json.dumps(document, indent=1)
    error = JsonStrictValidator(SchemaVersion.from_version(SPEC)).validate_str(text)
    if error is not None:
        sys.exit(f"not a CycloneDX {SPEC} document: {error}")
    Path(output).write_text(text)
    print(f"{len(document['components'])} components")


if __name__ == "__main__":
    main(*sys.argv[1:])
