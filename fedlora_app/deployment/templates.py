"""Start files for both ends: a systemd unit, a compose file, and the image that it runs.

They are written into ``templates/`` and start nothing by themselves. All call
``fedlora deploy start --foreground``, which ends with the processes that it started.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedlora_app.deployment.keys import write_public
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder

UNIT = """\
# Copy it to ~/.config/systemd/user/, then
#   systemctl --user daemon-reload
#   systemctl --user enable --now {unit}
#   loginctl enable-linger  # so that it runs while nobody is logged in
# As a system's service: copy it to /etc/systemd/system/ and add a line User= below [Service].
[Unit]
Description=fedlora-app: {what}
Wants=network-online.target
After=network-online.target
# A network may be away for hours; never give up.
StartLimitIntervalSec=0

[Service]
ExecStart="{fedlora}" deploy start --foreground "{folder}"
WorkingDirectory={working}
# For a minute a SuperLink refuses a SuperNode that was killed, which it takes for online.
Restart=on-failure
RestartSec=60
TimeoutStopSec=120
UMask=0077
NoNewPrivileges=true

[Install]
WantedBy=default.target
"""

DOCKERFILE = """\
# In the checkout of fedlora-app, of the commit that both ends have:
#   docker build -f {dockerfile} -t fedlora-app .
FROM python:3.11-slim
WORKDIR /app
# These by name: this folder may hold a deployment's keys, which belong into no image.
COPY pyproject.toml README.md LICENSE ./
COPY fedlora_app fedlora_app
COPY conf conf
RUN pip install --no-cache-dir -e .
ENV HOME=/tmp HF_HOME=/models
ENTRYPOINT ["fedlora"]
"""

COORDINATOR_COMPOSE = """\
# The SuperLink. Sites need this one port of it, and other machines are served nothing else:
#   docker compose -f {compose} up -d
#   docker compose -f {compose} exec superlink fedlora deploy status {folder}
# What asks it to run something must do so from within, as the line above does.
services:
  superlink:
    image: fedlora-app
    command: [deploy, start, --foreground, "{folder}"]
    user: "{user}"  # whose these folders are
    working_dir: "{project}"
    ports: ["{port}:{port}"]
    volumes:  # under the same names as outside, because coordinator.yaml names the project
      - "{folder}:{folder}"
      - "{project}:{project}"
    restart: unless-stopped
    stop_grace_period: 2m
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
    command: [deploy, start, --foreground, "{folder}"]
    user: "{user}"  # whose this folder is
    working_dir: "{folder}"
    volumes:  # and every folder that client.yaml names and that lies elsewhere
      - "{folder}:{folder}"
    environment: {{HF_HOME: "{folder}/models"}}
    restart: unless-stopped
    stop_grace_period: 2m
    read_only: true
    tmpfs: [/tmp]
    security_opt: ["no-new-privileges:true"]
    cap_drop: [ALL]
    # gpus: all  # with an NVIDIA GPU and NVIDIA's container toolkit
"""


def write_coordinator_templates(folder: CoordinatorFolder, port: int, project: Path) -> None:
    """Write the start files of the organisation that runs the SuperLink."""
    home, templates = folder.folder.resolve(), folder.templates
    unit = _fill_unit("fedlora-superlink.service", "the SuperLink", home, project)
    compose = COORDINATOR_COMPOSE.format(
        compose=templates / "compose.yaml", folder=home, project=project, port=port, user=_user()
    )
    _write(templates, {"fedlora-superlink.service": unit, "compose.yaml": compose})


def write_site_templates(folder: SiteFolder) -> None:
    """Write the start files of a site."""
    home, templates = folder.folder.resolve(), folder.templates
    unit = _fill_unit("fedlora-site.service", "a site's SuperNode and executor", home, home)
    compose = SITE_COMPOSE.format(compose=templates / "compose.yaml", folder=home, user=_user())
    _write(templates, {"fedlora-site.service": unit, "compose.yaml": compose})


def _fill_unit(name: str, what: str, home: Path, working: Path) -> str:
    fedlora = Path(sys.executable).with_name("fedlora")
    return UNIT.format(unit=name, what=what, fedlora=fedlora, folder=home, working=working)


def _user() -> str:
    return f"{os.getuid()}:{os.getgid()}"


def _write(templates: Path, texts: dict[str, str]) -> None:
    dockerfile = DOCKERFILE.format(dockerfile=templates / "Dockerfile")
    for name, text in (texts | {"Dockerfile": dockerfile}).items():
        write_public(templates / name, text.encode())
