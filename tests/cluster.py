"""A Slurm cluster of one machine, for tests: controller, node daemons, nothing outside one directory.

    python tests/cluster.py squeue        start a cluster, run a command in it, stop it

Needs Debian's slurm-wlm and munge; runs as root or as any user, on loopback ports that are free.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool/%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
MinJobAge=3600
MaxArraySize=101
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=00:10:00 MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=SBIN) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    try:  # as Slurm asks: a machine without any address but loopback's finds none
        socket.getaddrinfo("127.0.0.1", 0, socket.AF_INET, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    except OSError:
        return "Slurm needs an address beside loopback's: as root, ip address add 192.0.2.1/32 dev lo"
    return None


@contextlib.contextmanager
def running(cpus: int = 4) -> Iterator[dict[str, str]]:
    """A cluster of two nodes while the context lasts; gives the environment to call it in."""
    at = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {**os.environ, "PATH": SBIN, "SLURM_CONF": str(at / "slurm.conf")}
    environment = {key: value for key, value in environment.items() if not key.startswith(("SLURM_JOB", "SBATCH_"))}
    daemons: list[subprocess.Popen[bytes]] = []

    def daemon(*command: str) -> None:
        with open(at / f"{command[0]}.log", "ab") as log:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=at, start_new_session=True)
            )

    try:
        _configure(at, cpus)
        munge = (f"--{name}-file={at}/munge.{name}" for name in ("key", "pid", "log", "seed"))
        daemon("munged", "--foreground", f"--socket={at}/munge.sock", *munge)
        _until(lambda: (at / "munge.sock").exists(), at)
        daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            daemon("slurmd", "-D", "-N", node)
        _until(lambda: _answer(environment, "sinfo", "-hNt", "idle", "-o", "%N") == ["n1", "n2"], at)
        yield environment
    finally:
        _answer(environment, "scancel", "--state=PENDING")
        _answer(environment, "scancel", "--full", "--signal=KILL", "--state=RUNNING")
        with contextlib.suppress(TimeoutError):
            _until(lambda: not _answer(environment, "squeue", "-h"), at, seconds=60)
        for process in reversed(daemons):
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(at, ignore_errors=True)


def _configure(at: Path, cpus: int) -> None:
    for name in ("state", "spool", "cgroup"):
        (at / name).mkdir()
    at.chmod(0o755)  # munged refuses to put its socket where others may not look
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in held]
    host = socket.gethostname().split(".")[0]
    text = CONF.format(at=at, host=host, user=getpass.getuser(), ports=ports, cpus=cpus)
    (at / "slurm.conf").write_text(text.lstrip())
    # A cgroup plugin is loaded though nothing uses it; version 1 on an empty directory asks nothing of the machine.
    version = subprocess.run(["slurmd", "-V"], env={"PATH": SBIN}, capture_output=True, text=True).stdout
    old = int(version.split()[1].split(".")[0]) < 24
    plugin = "cgroup/v1" if old else "disabled"
    (at / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\nCgroupMountpoint={at}/cgroup\n")
    (at / "munge.key").write_bytes(os.urandom(128))
    (at / "munge.key").chmod(0o600)


def _answer(environment: dict[str, str], *command: str) -> list[str]:
    """Lines of a client's answer; clients of a silent controller would wait for a minute."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    except (subprocess.TimeoutExpired, OSError):
        return []
    return sorted(done.stdout.split())


def _until(true: Callable[[], object], at: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            logs = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(at.glob("*.log")))
            raise TimeoutError(f"the cluster did not come up in {seconds:.0f} s\n{logs}")
        time.sleep(0.05)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons must not outlive it
    if why := missing():
        sys.exit(why)
    with running() as surroundings:
        sys.exit(subprocess.call(sys.argv[1:], env=surroundings))
