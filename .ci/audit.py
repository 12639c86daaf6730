"""Ask for known vulnerabilities of the locked packages: status 1 where there are any or the audit itself fails; 0
where there are none or nobody could be asked.

Whoever cannot reach the database is told so in one line, which is not the same as "none are known".
"""

import json
import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"
UNREACHABLE = r"Connection|Connect|Timeout|timed out|Proxy|NameResolution|Max retries|ServiceError"


def main() -> int:
    # The lock has versions and hashes of everything: nothing is resolved, downloaded or installed.
    options = ["--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        run = subprocess.run(["pip-audit", *options, "-r", str(LOCK)], capture_output=True, text=True)
    except FileNotFoundError:
        print("audit: there is no pip-audit; `make env` installs it")
        return 1
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (run.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        if re.search(UNREACHABLE, last):
            print(f"audit: the vulnerability database cannot be reached, so nothing was checked ({last[:200]})")
            return 0
        print(run.stderr, file=sys.stderr)
        return run.returncode or 1
    if not packages:
        print(f"audit: pip-audit found no packages in {LOCK.name}, so nothing was checked")
        return 1
    checked = [package for package in packages if "vulns" in package]
    if not checked:
        print("audit: the vulnerability database knows none of the packages from here, so nothing was checked")
        return 0
    found = [(package, known) for package in checked for known in package["vulns"]]
    for package, known in found:
        fixed = ", ".join(known["fix_versions"]) or "none yet"
        print(f"audit: {package['name']} {package['version']} has {known['id']}, fixed in: {fixed}")
    left_out = f"; {len(packages) - len(checked)} could not be checked" if len(checked) < len(packages) else ""
    print(f"audit: {len(found)} known vulnerabilities in {len(checked)} packages{left_out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
