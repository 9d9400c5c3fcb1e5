"""Names of what evidence has beside the course of runs: keys, sites, processes and refusals.

Of a site its id and its key's fingerprint are entered, and of a process its name.
"""

from __future__ import annotations

SITE_INVITED, SITE_APPROVED = "site_invited", "site_approved"
SITE_ROTATED, SITE_REVOKED = "site_rotated", "site_revoked"
CERTIFICATE_RENEWED = "certificate_renewed"
PACKAGE_JOINED = "package_joined"
END_STARTED, END_STOPPED, END_FAILED = "end_started", "end_stopped", "end_failed"
CALL_REFUSED = "call_refused"  # by the SuperLink, of another machine
BUNDLE_REFUSED = "bundle_refused"  # by a site's executor
