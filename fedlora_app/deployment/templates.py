"""Start files for both ends: systemd units, a compose file, and the image that it runs.

They are written into ``templates/`` and start nothing by themselves. All call
``fedlora deploy start --foreground``, which ends with the processes that it started.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedlora_app.deployment.keys import write_public
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder

UNIT = """\
# Put it into ~/.config/systemd/user/ (or, with a line User=, into /etc/systemd/system/), then
#   systemctl --user daemon-reload && systemctl --user enable --now {unit}
# and, so that it runs while nobody is logged in: loginctl enable-linger
[Unit]
Description=fedlora-app: {what}
Wants=network-online.target
After=network-online.target
# A SuperNode that was killed cannot come back before its SuperLink takes it for gone, about a
# minute later. So never give up.
StartLimitIntervalSec=0

[Service]
ExecStart={fedlora} deploy start --foreground {folder}
WorkingDirectory={working}
Restart=always
RestartSec=20
TimeoutStopSec=120
UMask=0077
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ReadWritePaths={writable}

[Install]
WantedBy=default.target
"""

DOCKERFILE = """\
# Build it in the checkout of fedlora-app, so that the code has the sha256 that both ends compare:
#   docker build -f {dockerfile} -t fedlora-app .
FROM python:3.11-slim
RUN useradd --create-home --uid 1000 fedlora
WORKDIR /app
COPY --chown=fedlora . .
RUN pip install --no-cache-dir -e .
USER fedlora
ENV HF_HOME=/models
ENTRYPOINT ["fedlora"]
"""

COORDINATOR_COMPOSE = """\
# The SuperLink. Sites need this one port of it:
#   docker compose -f {compose} up -d
# Flower's own command asks it from within, because it is served on loopback alone:
#   docker compose -f {compose} exec -e FLWR_HOME=/deployment/flwr superlink \\
#     flwr run /app deployment
services:
  superlink:
    image: fedlora-app
    command: [deploy, start, --foreground, /deployment]
    restart: always
    stop_grace_period: 2m
    ports: ["{port}:{port}"]
    volumes:
      - {folder}:/deployment
      - {project}/results:/app/results
    read_only: true
    tmpfs: [/tmp]
    security_opt: ["no-new-privileges:true"]
    cap_drop: [ALL]
"""

SITE_COMPOSE = """\
# SuperNode and executor of one site. No port is published: all connections go out.
#   docker compose -f {compose} up -d
services:
  site:
    image: fedlora-app
    command: [deploy, start, --foreground, /site]
    restart: always
    stop_grace_period: 2m
    volumes:
      - {folder}:/site  # client.yaml names data and model by paths in here
      - models:/models
    read_only: true
    tmpfs: [/tmp]
    security_opt: ["no-new-privileges:true"]
    cap_drop: [ALL]
    # With an NVIDIA GPU and the NVIDIA container toolkit:
    # gpus: all
volumes:
  models:
"""


def write_coordinator_templates(folder: CoordinatorFolder, port: int, project: Path) -> None:
    """Write the start files of the organisation that runs the SuperLink."""
    home = folder.folder.resolve()
    unit = _unit("fedlora-superlink.service", "the SuperLink", home, project, project)
    compose = COORDINATOR_COMPOSE.format(
        compose=folder.templates / "compose.yaml", port=port, folder=home, project=project
    )
    _write(folder.templates, "fedlora-superlink.service", unit, compose)


def write_site_templates(folder: SiteFolder) -> None:
    """Write the start files of a site."""
    home = folder.folder.resolve()
    unit = _unit("fedlora-site.service", "SuperNode and executor", home, home, home)
    compose = SITE_COMPOSE.format(compose=folder.templates / "compose.yaml", folder=home)
    _write(folder.templates, "fedlora-site.service", unit, compose)


def _unit(name: str, what: str, home: Path, working: Path, writable: Path) -> str:
    fedlora = Path(sys.executable).with_name("fedlora")
    paths = " ".join(dict.fromkeys((str(home), str(writable), "-%h/.cache")))
    return UNIT.format(
        unit=name, what=what, fedlora=fedlora, folder=home, working=working, writable=paths
    )


def _write(templates: Path, unit_name: str, unit: str, compose: str) -> None:
    dockerfile = DOCKERFILE.format(dockerfile=templates / "Dockerfile")
    for name, text in ((unit_name, unit), ("compose.yaml", compose), ("Dockerfile", dockerfile)):
        write_public(templates / name, text.encode())
