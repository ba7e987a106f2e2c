"""A real Slurm cluster of virtual nodes on this machine, for tests.

Every node, and the login node ``ctl`` that also runs the controller, is a set of namespaces of its own (net, pid, uts,
ipc, mount) held by one process. Nodes see the machine's files, but have their own hostname, address, process ids,
mounts and /dev/shm. Nothing of it has a name outside: no named network namespace, no link, no file in /etc. So clusters
do not collide, and a node is gone with its first process, even when the tests are killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"
PROGRAMS = ("slurmctld", "slurmd", "srun", "scontrol", "munged", "ip", "unshare", "nsenter", "setpriv")
LOGIN = "ctl"

SUBNET = "10.77.0"
"""Between the nodes only: there is no way from there to the machine's own network, so it cannot be in use."""

POLL_S = 0.2
SAVE_S = 5
"""slurmctld saves its state at most this often (SAVE_MAX_WAIT in its source)."""

LONGEST_SCRATCH = 66
"""slurmd's sockets (spool/node10/node10_12345.4294967291) must keep within the 107 characters of a socket's path."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
"""States that a job leaves only when a person requeues it."""

Value = TypeVar("Value")

# bash as the first process: it also reaps what daemons and jobs leave behind. /sys anew: it shows this net namespace.
FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t sysfs sysfs /sys
mount -t tmpfs -o size=2g tmpfs /dev/shm
echo ready
exec >&-
sleep infinity &
wait
"""

KILL_AND_WAIT = """
pid=$(<"$1")
kill -KILL $pid
while kill -0 $pid 2>/dev/null; do sleep 0.05; done
"""

KILL_STRAYS = """
for environ in $(grep -lz '^SLURM_JOB_ID=' /proc/[0-9]*/environ 2>/dev/null); do
  pid=${environ#/proc/}
  kill -KILL ${pid%/environ} 2>/dev/null
done
true
"""

# MessageTimeout is long because an order to end a job that a busy node answers too late is sent again a minute later,
# and ends the job's next start there.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=ctl({subnet}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={scratch}/munge/socket,cred_expire=5
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool/%n
SlurmctldPidFile={scratch}/run/slurmctld.pid
SlurmdPidFile={scratch}/run/slurmd-%n.pid
SlurmctldLogFile={scratch}/log/slurmctld.log
SlurmdLogFile={scratch}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=20
KillWait=5
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
RequeueExit=85
CompleteWait=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=node[1-{num_nodes}] CPUs={cpus} RealMemory=64000 {gres} State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """A command on the cluster failed, or the cluster did not come up."""


def find_missing() -> str | None:
    """What this machine lacks to run a cluster, and what to do; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root, for its namespaces; run the tests as root"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_search_path())]
    if missing:
        install = f"apt-get install -y --no-install-recommends {PACKAGES}"
        return f"a Slurm cluster for tests needs {', '.join(missing)}; {install}"
    return None


@dataclass
class _Machine:
    """A node that has power: the process that holds its namespaces, and the first process within them."""

    holder: subprocess.Popen
    first: psutil.Process


class Cluster:
    """Slurm with partitions ``batch`` (default) and ``urgent`` (which preempts it); all its files lie in ``scratch``.

    Call it from the main thread: the nodes die with the thread that booted them.
    """

    def __init__(self, scratch: Path, cpus: int = 4, gpus: int = 0) -> None:
        """``cpus`` and (fake) ``gpus`` are those of each node."""
        self.scratch = scratch.resolve()
        self.cpus, self.gpus = cpus, gpus
        self.nodes: list[str] = []
        self._running: dict[str, _Machine] = {}
        if len(str(self.scratch)) > LONGEST_SCRATCH:
            raise ValueError(f"{self.scratch}: sockets need a path of at most {LONGEST_SCRATCH} characters; shorten it")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    # ---- the whole cluster

    def up(self, num_nodes: int) -> None:
        """Starts ``node1`` to ``node<num_nodes>`` and waits until all are idle; when that fails, nothing is left."""
        if self._running:
            raise ClusterError(f"the cluster in {self.scratch} is up; call down() first")
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        try:
            self._write_files()
            self._power_on(LOGIN)
            self._ip(LOGIN, "link", "add", "br0", "type", "bridge")
            self._ip(LOGIN, "addr", "add", f"{SUBNET}.254/24", "dev", "br0")
            self._ip(LOGIN, "link", "set", "br0", "up")
            self.run_on(LOGIN, "munged", *self._munge_options())
            self._start_controller()
            for node in self.nodes:
                self.boot(node)
            self.wait_until_idle(seconds=60)
        except BaseException as error:
            logs = self.logs()
            self.down()
            if isinstance(error, Exception):
                raise ClusterError(f"the cluster in {self.scratch} did not come up: {error}\n{logs}") from error
            raise

    def down(self) -> None:
        """Ends every process of the cluster, and with them its namespaces and links. The files in scratch stay."""
        for machine in self._running.values():
            _kill(machine)
        for machine in self._running.values():
            machine.holder.wait(timeout=60)
        self._running.clear()

    def tidy(self, seconds: float = 60) -> None:
        """Makes the cluster as new for the next test: no jobs, links whole, every node booted and idle.

        What was mounted on a node stays.
        """
        self._has_no_jobs()
        for node in self.nodes:
            if node not in self._running:
                self.boot(node)
            self.heal(node)
            if {"DOWN", "DRAIN", "FAIL"} & set(self.node_states(node)):
                with contextlib.suppress(ClusterError):  # it came back by itself meanwhile
                    self.resume(node)
        self.wait_for(self._has_no_jobs, seconds, "no job in the queue")
        for node in self.nodes:  # without cgroups Slurm leaves a job's background processes alone
            self.run_on(node, "bash", "-c", KILL_STRAYS)
        self.wait_until_idle(seconds)

    def logs(self, num_lines: int = 25) -> str:
        """The last lines of what every daemon logged."""
        tails = []
        for path in sorted((self.scratch / "log").glob("*")):
            lines = path.read_text(errors="replace").splitlines()
            if lines:
                tails.append("\n".join([f"-- {path}", *lines[-num_lines:]]))
        return "\n".join(tails)

    # ---- commands

    def login(
        self,
        *command: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node. ``env`` is added to the tests' environment, less that of any job."""
        return self.run_on(LOGIN, *command, env=env, cwd=cwd, timeout=timeout, check=check)

    def run_on(
        self,
        node: str,
        *command: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command within a node, not as a job. What it mounts is seen there and by later jobs there, only."""
        words = [str(word) for word in command]
        inside = ["env", f"--chdir={Path(cwd or '.').resolve()}", *words]
        kinds = ["--mount", "--uts", "--ipc", "--net", "--pid"]
        environ = self._environ() | dict(env or {})
        done = _run(["nsenter", "--target", self._pid(node), *kinds, *inside], environ, timeout, f"{words} on {node}")
        if check and done.returncode != 0:
            said = (done.stdout[-2000:] + done.stderr[-2000:]).strip()
            raise ClusterError(f"on {node}, exit code {done.returncode}: {shlex.join(words)}\n{said}")
        return done

    def sbatch(self, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | str | None = None) -> int:
        """Submits a job; its id."""
        answer = self.login("sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout
        return int(answer.split(";")[0])

    # ---- what Slurm knows

    def job(self, job_id: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job; of an array, name one task (``"12_0"``)."""
        lines = self.login("scontrol", "show", "job", "--oneliner", job_id).stdout.strip().splitlines()
        if len(lines) != 1:
            raise ValueError(f"job {job_id} is an array of {len(lines)}; name a task, as in {job_id}_0")
        return _parse_fields(lines[0])

    def hosts(self, job_id: int | str) -> list[str]:
        """The nodes that a job has, or had last; none before its first start."""
        listed = self.job(job_id)["NodeList"]
        if listed in ("", "(null)"):
            return []
        return self.login("scontrol", "show", "hostnames", listed).stdout.split()

    def node_states(self, node: str) -> list[str]:
        """A node's state and its flags, such as ``["IDLE"]`` or ``["DOWN", "NOT_RESPONDING"]``."""
        self._number(node)
        state = _parse_fields(self.login("scontrol", "show", "node", "--oneliner", node).stdout)["State"]
        return [word.rstrip("*") for word in state.split("+")] + (["NOT_RESPONDING"] if "*" in state else [])

    def wait_for(self, predicate: Callable[[], Value], seconds: float, what: str) -> Value:
        """Asks ``predicate`` again and again until what it returns is true, and returns that."""
        end = time.monotonic() + seconds
        while True:
            value = predicate()
            if value:
                return value
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} s for: {what}\n{self._queue()}")
            time.sleep(POLL_S)

    def wait_for_state(self, job_id: int | str, *states: str, seconds: float) -> dict[str, str]:
        """Waits until a job is in one of ``states``, and returns its fields; fails at once when it ends in another."""
        last: dict[str, str] = {}

        def is_there() -> bool:
            last.update(self.job(job_id))
            return last["JobState"] in states or last["JobState"] in ENDED

        what = f"job {job_id} {' or '.join(states)}"
        try:
            self.wait_for(is_there, seconds, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{_describe(last)}") from error
        if last["JobState"] not in states:
            raise ClusterError(f"waited for: {what}\n{_describe(last)}")
        return last

    def wait_until_idle(self, seconds: float) -> None:
        """Waits until every node is idle."""

        def is_idle() -> bool:
            command = ["sinfo", "--noheader", "--Node", "--partition", "batch", "--format", "%N %t"]
            answer = self.login(*command, check=False).stdout
            return {line.split()[0] for line in answer.splitlines() if line.endswith(" idle")} == set(self.nodes)

        self.wait_for(is_idle, seconds, f"{len(self.nodes)} idle nodes")

    # ---- what may happen to a node

    def crash(self, node: str) -> None:
        """The node loses its power: the others hear nothing from it any more, not even an end of their connections."""
        machine = self._machine(node)
        self._ip(LOGIN, "link", "del", self._link(node))
        _kill(machine)
        machine.holder.wait(timeout=60)
        del self._running[node]

    def boot(self, node: str) -> None:
        """Power on: a node that crashed starts its slurmd again. Its mounts and /dev/shm are new."""
        number = self._number(node)
        if node in self._running:
            raise ClusterError(f"{node} is up; crash() it before boot()")
        first = self._power_on(node)
        link = self._link(node)
        self._ip(LOGIN, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(first.pid))
        self._ip(LOGIN, "link", "set", link, "master", "br0", "up")
        self._ip(node, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        self._ip(node, "link", "set", "eth0", "up")
        self.run_on(node, "slurmd")

    def cut(self, node: str) -> None:
        """The node's network goes; its processes run on."""
        self._machine(node)
        self._ip(LOGIN, "link", "set", self._link(node), "down")

    def heal(self, node: str) -> None:
        """The node's network is back."""
        self._machine(node)
        self._ip(LOGIN, "link", "set", self._link(node), "up")

    def set_down(self, node: str, reason: str) -> None:
        """An operator declares the node down: its jobs are requeued at once."""
        self._number(node)
        self.login("scontrol", "update", f"NodeName={node}", "State=DOWN", f"Reason={reason}")

    def resume(self, node: str) -> None:
        """An operator takes a node that is down or drained back into service."""
        self._number(node)
        self.login("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def restart_controller(self) -> None:
        """Kills slurmctld with -9, once it has saved its state, and starts it again with that state."""
        asked, saved = time.time(), self.scratch / "state" / "job_state"
        # What it did in its last seconds may be unsaved; when nothing is, no save comes.
        while time.time() < asked + SAVE_S + 1 and not (saved.exists() and saved.stat().st_mtime > asked + POLL_S):
            time.sleep(POLL_S)
        self.login("bash", "-c", KILL_AND_WAIT, "bash", self.scratch / "run" / "slurmctld.pid", timeout=20)
        self._start_controller()

    # ---- inside

    def _write_files(self) -> None:
        for name in ("etc", "munge", "state", "log", "run", "spool", "dev"):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        key = self.scratch / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        hosts = [f"127.0.0.1 localhost\n{SUBNET}.254 {LOGIN}\n"]
        hosts += [f"{SUBNET}.{self._number(node)} {node}\n" for node in self.nodes]
        (self.scratch / "etc" / "hosts").write_text("".join(hosts))
        conf = SLURM_CONF.format(
            subnet=SUBNET,
            scratch=self.scratch,
            num_nodes=len(self.nodes),
            cpus=self.cpus,
            gres=f"Gres=gpu:{self.gpus}" if self.gpus else "",
        )
        (self.scratch / "etc" / "slurm.conf").write_text(conf)
        # Of the two plugins this one starts without its mounts in /sys; no setting above makes use of it.
        (self.scratch / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [self.scratch / "dev" / f"nvidia{number}" for number in range(self.gpus)]
        for device in devices:
            if not device.exists():
                os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        gres = f"Name=gpu File={','.join(map(str, devices))}\n" if devices else ""
        (self.scratch / "etc" / "gres.conf").write_text(gres)

    def _munge_options(self) -> list[str]:
        places = {"key-file": "munge/key", "socket": "munge/socket", "pid-file": "munge/pid", "seed-file": "munge/seed"}
        places["log-file"] = "log/munged.log"
        # --force: it would refuse a scratch folder that other users cannot read.
        return ["--force", "--num-threads=4", *(f"--{name}={self.scratch / path}" for name, path in places.items())]

    def _start_controller(self) -> None:
        self.login("slurmctld")
        self.wait_for(lambda: " UP" in self.login("scontrol", "ping", check=False).stdout, 30, "slurmctld to answer")

    def _power_on(self, name: str) -> psutil.Process:
        """Makes the namespaces of a node; returns the first process in them, seen from here."""
        hold = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child=KILL"]
        kinds = ["--net", "--uts", "--ipc", "--pid", "--mount-proc"]
        first = ["bash", "-c", FIRST_PROCESS, "bash", name, str(self.scratch / "etc" / "hosts")]
        boot_log = self.scratch / "log" / f"{name}.boot"
        with boot_log.open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
            holder = subprocess.Popen([*hold, *kinds, *first], env=self._environ(), start_new_session=True, **pipes)
        try:
            with holder.stdout as answer:
                if answer.readline() != b"ready\n":
                    said = boot_log.read_text().strip()
                    raise ClusterError(f"{name} has no namespaces: {said}; that takes root with CAP_SYS_ADMIN")
            self._running[name] = _Machine(holder, psutil.Process(holder.pid).children()[0])
        except BaseException:
            holder.kill()
            holder.wait(timeout=60)
            raise
        self._ip(name, "link", "set", "lo", "up")
        return self._running[name].first

    def _ip(self, name: str, *words: str) -> None:
        """``ip`` in the net namespace of a node, but with this machine's process ids."""
        command = ["nsenter", "--target", self._pid(name), "--net", "ip", *words]
        done = _run(command, self._environ(), 60, shlex.join(command))
        if done.returncode != 0:
            raise ClusterError(f"on {name}: ip {shlex.join(words)}: {done.stderr.strip()}")

    def _environ(self) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if not re.match("SLURM_|SBATCH_|SRUN_|SALLOC_", key)}
        return ours | {"SLURM_CONF": str(self.scratch / "etc" / "slurm.conf"), "PATH": _search_path()}

    def _machine(self, name: str) -> _Machine:
        if name != LOGIN:
            self._number(name)
        if name not in self._running:
            raise ClusterError(f"{name} is off; boot() it, or up() the cluster first")
        return self._running[name]

    def _pid(self, name: str) -> str:
        return str(self._machine(name).first.pid)

    def _number(self, node: str) -> int:
        if node not in self.nodes:
            raise ValueError(f"there is no {node!r}; the nodes are {', '.join(self.nodes) or 'not up yet'}")
        return self.nodes.index(node) + 1

    def _link(self, node: str) -> str:
        return f"v{self._number(node)}"

    def _has_no_jobs(self) -> bool:
        """Cancels again what is still there: a job may have requeued itself in the meantime."""
        queued = self.login("squeue", "--noheader", "--format", "%i").stdout.split()
        if queued:
            self.login("scancel", *queued, check=False)
        return not queued

    def _queue(self) -> str:
        if LOGIN not in self._running:
            return "the cluster is off"
        jobs = self.login("squeue", "--format", "%.8i %.9P %.16j %.10T %.6M %.14N %r", check=False, timeout=30)
        nodes = self.login("sinfo", "--Node", "--format", "%N %P %T %E", check=False, timeout=30)
        return jobs.stdout + jobs.stderr + nodes.stdout + nodes.stderr


def _search_path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def _run(command: list[str], environ: dict[str, str], timeout: float, what: str) -> subprocess.CompletedProcess[str]:
    """A command whose whole process group ends with the time: TERM first, so that srun can give its job back."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    text: dict[str, Any] = {"text": True, "errors": "replace"}
    with subprocess.Popen(command, env=environ, start_new_session=True, **pipes, **text) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            out, err = _end_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                said = (out[-2000:] + err[-2000:]).strip()
                raise TimeoutError(f"not done after {timeout} s: {what}\n{said}") from error
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end_group(process: subprocess.Popen[str]) -> tuple[str, str]:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)
    return "", ""


def _kill(machine: _Machine) -> None:
    """Of the first process: the kernel ends all others of a pid namespace before that one is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        machine.first.kill()


def _parse_fields(line: str) -> dict[str, str]:
    """``Key=value Other=its value`` as a dictionary."""
    found = list(re.finditer(r"(?:^| )([A-Z][A-Za-z:/_]*)=", line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return {match[1]: line[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def _describe(job: dict[str, str]) -> str:
    """What became of a job, with the end of what it printed."""
    said = Path(job.get("StdOut", ""))
    lines = said.read_text(errors="replace").splitlines()[-30:] if said.is_file() else []
    state = f"job {job['JobId']} is {job['JobState']}, reason {job['Reason']}, exit code {job['ExitCode']}"
    return "\n".join([f"{state}, restarts {job['Restarts']}, nodes {job['NodeList']}; the end of {said}:", *lines])
