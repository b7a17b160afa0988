"""Make data with an environment's own packages: servers/make_data.py in its image, or in its virtual environment."""
from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from invoke.context import Context

from tasks.lib.engine.builds import build_variables
from tasks.lib.engine.client import ENGINE_AT_LEAST_FOR_ENVIRONMENTS, drive, require_engine
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import local as env_local
from tasks.lib.environments.lookup import data_folder, local_source
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import Environment
from tasks.lib.environments.start_stop import choose_server_runner, images_exist, write_compose_file
from tasks.lib.host.venvs import run_quietly
from tasks.lib.settings import ROOT


@dataclass(frozen=True)
class Maker:
    """Makes data of `row`; nothing is built or started before it is called."""
    c: Context
    row: Environment
    runner: str

    def __call__(self, what: str, out: Path) -> None:
        """Make `what` (a name of servers/make_data.py) as `out`.

        Raises:
            UserError: the program's own reason, or that it cannot run.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=out.parent) as folder:
            made = Path(folder) / "made"
            if choose_server_runner(self.runner) == "docker":
                self._in_image(what, made)
            else:
                self._in_venv(what, made)
            made.rename(out)

    def _in_venv(self, what: str, out: Path) -> None:
        row = self.row
        python, _, copy = env_local.prepare(row, local_source(row), data_folder(row))
        run_quietly([
            str(python),
            str(ROOT / "servers" / "make_data.py"), what,
            str(out), "--source",
            str(copy), "--data",
            str(data_folder(row))
        ], f"making {what}")

    def _in_image(self, what: str, out: Path) -> None:
        row, options = self.row, Options(port=self.row.port)
        require_engine(self.c, ENGINE_AT_LEAST_FOR_ENVIRONMENTS)
        if not images_exist(row, options):
            file = write_compose_file(self.c, row, options, "build.json")
            env_docker.build(self.c, row, options, file, build_variables(""))
        data = data_folder(row).resolve()
        volumes = [(str(out.parent), "/out", "rw")]
        if data.is_dir():
            volumes.append((str(data), f"/data/{row.name}", "ro"))
        command = [
            "python", "/opt/servers/make_data.py", what, f"/out/{out.name}", "--source", "/srv", "--data",
            f"/data/{row.name}"
        ]
        drive(
            self.c, lambda client: client.run(env_docker.server_image(row),
                                              command,
                                              volumes=volumes,
                                              user=f"{os.getuid()}:{os.getgid()}",
                                              cap_drop=["ALL"],
                                              networks=["none"],
                                              remove=True,
                                              stream=True))
