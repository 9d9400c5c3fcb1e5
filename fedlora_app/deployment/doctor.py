"""Looks at what a deployment needs at this end, before anything is started or while it runs."""

from __future__ import annotations

from pathlib import Path

from fedlora_app.deployment.coordinator_checks import examine_coordinator
from fedlora_app.deployment.finding import Finding
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.site_checks import examine_site
from fedlora_app.foundation.errors import UserError


class DoctorError(UserError):
    """The folder is neither a coordinator's nor a site's."""


def examine(folder: Path) -> list[Finding]:
    """Return a finding for everything that was looked at.

    Raises:
        DoctorError: there is no deployment in the folder.
    """
    if CoordinatorFolder(folder).settings.exists():
        return list(examine_coordinator(folder))
    if SiteFolder(folder).request.exists():
        return list(examine_site(folder))
    raise DoctorError(
        f"{folder} is neither a coordinator's folder nor a site's. Name one: "
        "fedlora deploy doctor DIR"
    )
