"""Kill a merge again and again, inside its saves and anywhere else, resume it every time, and count what was lost.

Every run is a ``dmm merge`` of three embedded experts with ``--resume``, killed by SIGKILL at a random moment and
inside a save, resumed after each, and compared at its end, file by file, with a run that was never stopped. Then a
disk fills up during a save; and of two processes that ``torchrun`` started, either one is killed. Prints the figures;
exits with 1 if any is not what it should be.

  python benchmarks/kill.py               50 kills, 10 of them of newly started interpreters
  python benchmarks/kill.py --runs 2 --fresh 0 --no-ranks
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

# the runs are forked from this process, so that they need not import all of this each time; all that is imported
# here must leave it without threads
import dmm.training.merge  # noqa: F401
from dmm.cli import main as dmm_command
from dmm.demo import expert_sources
from dmm.files.digest import sha256
from dmm.files.runs import CHECKPOINTS, LOG
from dmm.files.yaml import write_yaml
from dmm.models.teachers import ModelSource
from dmm.training.checkpoint import MANIFEST, newest_checkpoint

TEACHERS = ("noto", "twemoji", "openmoji")
STEPS, EVERY = 20, 2
POLL_SECONDS = 0.002
PATIENCE_SECONDS = 600.0
END_SECONDS = 30.0
"""In which a run must end that has lost a process."""
FRESH = ("-m", "dmm")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *FRESH)


@dataclass
class Pace:
    """What a run takes, in seconds, as seen on the one that was never stopped."""

    start: float
    step: float
    save: float
    """The shortest."""


@dataclass
class Figures:
    """What became of the kills."""

    kills: int = 0
    of_fresh: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    """Kills inside a save, by how far it had come."""
    resumed: int = 0
    broken: int = 0
    lost: int = 0
    same_ends: int = 0
    finished_left_alone: int = 0


class Run:
    """A merge in a folder of its own, in a process of its own whenever it is under way.

    Args:
        folder: of the run.
        recipe: what is merged.
        launcher: what Python is started with; by default none is started, and this process is forked.
    """

    def __init__(self, folder: Path, recipe: Path, launcher: Sequence[str] = ()) -> None:
        self.folder, self.recipe, self.launcher = folder, recipe, launcher
        self.output = folder.with_suffix(".txt")
        self.root = folder / CHECKPOINTS
        self.pid = 0
        self.started = 0.0

    def start(self) -> None:
        """Start, or go on."""
        self.started = time.time()
        command = ["merge", str(self.recipe), "--output", str(self.folder), "--resume"]
        self.pid = os.fork()
        if self.pid:
            return
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if self.launcher:
            os.execv(sys.executable, [sys.executable, *self.launcher, *command])
        status = 1
        try:
            status = dmm_command(command)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def status(self) -> int | None:
        """The exit status; None while it is under way."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """By SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, f"ended by itself: see {self.output}"

    def log(self) -> list[dict[str, float]]:
        """The entries that are whole."""
        path = self.folder / LOG
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def new_steps(self) -> list[int]:
        """The steps that were logged since the last start."""
        return [int(entry["step"]) for entry in self.log() if entry["time"] > self.started]

    def temporaries(self) -> list[Path]:
        """What saves that are under way, or were killed, have made."""
        return list(self.root.glob(".tmp-*"))

    def committed(self) -> int:
        """The last step that has a checkpoint in place, whole or not; 0 where there is none."""
        return max((int(path.name[5:13]) for path in self.root.glob("step-*")), default=0)

    def whole(self) -> int:
        """The last step of which every byte of the checkpoint is as the manifest says."""
        newest = newest_checkpoint(self.root)
        return int(newest.name[5:13]) if newest else 0

    def files(self) -> dict[str, str]:
        """All that there is at the end, by sha256, but the log: that has the time in it."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.name != LOG)
        return {str(path.relative_to(self.folder)): sha256(path) for path in sorted(paths)}

    def curves(self) -> list[dict[str, float]]:
        """The log without the time."""
        return [{name: value for name, value in entry.items() if name != "time"} for entry in self.log()]

    def saving(self) -> set[Path]:
        """The folder that a save fills, while it does; and what killed ones have left."""
        return {path for path in self.temporaries() if not path.name.startswith(".tmp-step")}

    def await_save(self) -> Path:
        """Wait until a save has begun, and return the folder that it fills."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        before = self.saving()
        while not (begun := self.saving() - before):
            self._wait(deadline)
        return begun.pop()

    def await_steps(self, number: int, seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait until ``number`` steps were logged since the start, or time is over; returns whether they were."""
        deadline = time.monotonic() + seconds
        while len(self.new_steps()) < number:
            if time.monotonic() > deadline:
                return False
            self._wait(deadline + PATIENCE_SECONDS)
        return True

    def _wait(self, deadline: float) -> None:
        assert self.status() is None, f"ended by itself: see {self.output}"
        assert time.monotonic() < deadline, f"nothing happens: see {self.output}"
        time.sleep(POLL_SECONDS)


def write_recipe(folder: Path) -> Path:
    """A short merge whose state has all that a state may have."""
    sources = expert_sources()
    recipe = {
        "base": str(sources["base"].model),
        "teachers": [_teacher(name, sources[name]) for name in TEACHERS],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 8, "steps": 4, "guidance": 2.0}},
        "size": 32,
        "styles": {"rank": 0},
        "training": {
            **{"steps": STEPS, "batch_size": 6, "learning_rate": 1e-3, "precision": "fp32"},
            **{"lr_schedule": "cosine", "warmup_steps": 3, "ema_decay": 0.9},
        },
        "losses": {"feature": 0.1, "adversarial": 0.01},
        "checkpoint": {"every": EVERY, "keep": 2},
        "logging": {"every": 1, "sample_every": None},
    }
    (folder / "prompts.txt").write_text("fox\nrocket\npalm tree\n", encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(write_yaml(recipe), encoding="utf-8")
    return path


def _teacher(name: str, source: ModelSource) -> dict[str, str]:
    parts = {"model": source.model, "config": source.config, "lora": source.loras[0][0] if source.loras else None}
    return {"name": name, **{key: str(path) for key, path in parts.items() if path is not None}}


def run_whole(run: Run) -> Pace:
    """Run to the end without a stop, and time it."""
    run.start()
    saves: list[float] = []
    since = None
    while (status := run.status()) is None:
        saving = run.saving()
        if saving and since is None:
            since = time.monotonic()
        elif not saving and since is not None:
            saves.append(time.monotonic() - since)
            since = None
        time.sleep(POLL_SECONDS)
    assert status == 0, run.output.read_text(encoding="utf-8")
    times = [entry["time"] for entry in run.log()]
    steps = sorted(after - before for before, after in pairwise(times))
    return Pace(times[0] - run.started, steps[len(steps) // 2], min(saves))


def kill_anywhere(run: Run, pace: Pace, moments: random.Random) -> None:
    """Kill while it starts, or in one of the next steps."""
    steps = moments.randrange(5)
    run.await_steps(steps)
    # the machine may be quicker by now
    run.await_steps(steps + 1, seconds=moments.uniform(0, pace.step if steps else pace.start))
    run.kill()


def kill_in_save(run: Run, pace: Pace, moments: random.Random) -> None:
    """Kill when a save has begun, before it should have ended; if it has, wait for the next."""
    run.await_steps(1 + moments.randrange(2 * EVERY))
    while True:
        folder = run.await_save()
        time.sleep(moments.uniform(0, pace.save))
        if folder.exists():
            break
        pace.save /= 2  # the machine is quicker by now
    run.kill()


def torment(run: Run, never_stopped: Run, pace: Pace, moments: random.Random, figures: Figures) -> None:
    """Kill a run at a random moment and inside a save, in either order, and let it end."""
    pending = committed = 0

    def look() -> None:
        """The first step that was logged since the start tells where it went on from."""
        nonlocal pending
        if steps := run.new_steps():
            figures.resumed += pending if steps[0] == committed + 1 else 0
            pending = 0

    for kill in moments.sample([kill_anywhere, kill_in_save], 2):
        hit = False
        while not hit:
            before = set(run.temporaries())
            run.start()
            kill(run, pace, moments)
            look()
            pending += 1
            figures.kills += 1
            figures.of_fresh += bool(run.launcher)
            inside = next(iter(set(run.temporaries()) - before), None)
            if inside:
                figures.inside[_stage(inside)] += 1
            # a step is logged when every save before it has returned
            promised = max([committed, *((step - 1) // EVERY * EVERY for step in run.new_steps())])
            committed = run.whole()
            figures.lost += committed < promised
            figures.broken += committed != run.committed()
            hit = inside is not None or kill is kill_anywhere  # else the save was quicker: try the next one
    run.start()
    status = run.end()
    look()
    figures.same_ends += status == 0 and is_same(run, never_stopped)


def _stage(temporary: Path) -> str:
    """How far a save had come that has left this."""
    if temporary.name.startswith(".tmp-step"):
        return "removing an older one"
    return "all written, not in place" if (temporary / MANIFEST).exists() else "writing"


def is_same(run: Run, never_stopped: Run) -> bool:
    """Whether every file and every logged figure is."""
    return run.files() == never_stopped.files() and run.curves() == never_stopped.curves()


def fill_disk(run: Run, never_stopped: Run) -> str:
    """Let no file grow beyond 100 kB once there is a checkpoint, as on a disk that is full; then go on without.

    Returns: what the run said.
    """
    run.start()
    run.await_steps(EVERY + 1)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**5, 10**5))
    status, told = run.end(), run.output.read_text(encoding="utf-8").splitlines()[-1]
    assert status == 2, run.output
    assert told.startswith("dmm: error: "), told
    assert run.whole() == run.committed() >= EVERY, told
    assert not run.temporaries(), told
    run.start()
    assert run.end() == 0, run.output
    assert is_same(run, never_stopped), "after the disk was full, the run ends otherwise"
    return told


def lose_rank(rank: int, run: Run, never_stopped: Run) -> tuple[float, str]:
    """Kill one of two processes in the middle of its steps, then go on with both.

    Returns: in how many seconds the launcher has ended, and what the other process said.
    """
    run.start()
    run.await_steps(EVERY + 1)
    workers = psutil.Process(run.pid).children(recursive=True)
    next(worker for worker in workers if worker.environ().get("RANK") == str(rank)).kill()
    start = time.monotonic()
    status = run.end()
    seconds = time.monotonic() - start
    assert status != 0, run.output
    assert not any(worker.is_running() for worker in workers), "a process was left behind"
    said = f"dmm: error: Rank {1 - rank} of 2, step "
    output = run.output.read_text(encoding="utf-8")
    assert said in output, f"nobody told of it: {output[-2000:]}"  # it may share its line with a progress bar
    told = output[output.index(said) :].splitlines()[0]
    run.start()
    assert run.end() == 0, run.output
    assert is_same(run, never_stopped), "after a process was lost, the run ends otherwise"
    return seconds, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="each is killed twice")
    parser.add_argument("--fresh", type=int, default=5, help="of them, started as new interpreters")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ranks", action=argparse.BooleanOptionalAction, default=True, help="two processes, too")
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; by default they are removed")
    args = parser.parse_args()

    begin = time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="dmm-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(folder)
    never_stopped = Run(folder / "never-stopped", recipe)
    run_whole(never_stopped)  # which also encodes the data
    again = Run(folder / "again", recipe)
    pace = run_whole(again)
    assert is_same(again, never_stopped), "two runs that were never stopped differ"
    newest = newest_checkpoint(never_stopped.root)
    assert newest
    size = sum(path.stat().st_size for path in newest.iterdir())
    print(
        f"never stopped: {STEPS} steps, a checkpoint of {size / 1e6:.1f} MB every {EVERY}; {pace.start:.1f} s to the "
        f"first step, {pace.step:.2f} s a step, {pace.save:.3f} s a save",
        flush=True,
    )

    figures, moments = Figures(), random.Random(args.seed)
    for index in range(args.runs):
        run = Run(folder / f"run-{index:02d}", recipe, FRESH if index >= args.runs - args.fresh else ())
        torment(run, never_stopped, pace, moments, figures)
        print(
            f"  run {index + 1} of {args.runs}: {figures.kills} kills so far, {figures.inside.total()} inside a save, "
            f"{figures.resumed} resumed; {figures.same_ends} ends equal to the bit",
            flush=True,
        )
        if index == 0:
            run.start()
            figures.finished_left_alone += run.end() == 0 and is_same(run, never_stopped)
        shutil.rmtree(run.folder)
    told = fill_disk(Run(folder / "full", recipe), never_stopped)
    losses = []
    if args.ranks:
        two = Run(folder / "two", recipe, TWO)
        two.start()
        assert two.end() == 0, two.output
        losses = [lose_rank(rank, Run(folder / f"lost-{rank}", recipe, TWO), two) for rank in range(2)]
    if not args.folder:
        shutil.rmtree(folder)

    stages = ", ".join(f"{count} {stage}" for stage, count in figures.inside.most_common())
    print(f"killed by SIGKILL          {figures.kills}, {figures.of_fresh} of them newly started interpreters")
    print(f"  inside a save            {figures.inside.total()}: {stages}")
    print(f"resumed at the right step  {figures.resumed} of {figures.kills}")
    print(f"broken checkpoints         {figures.broken}")
    print(f"committed steps lost       {figures.lost}")
    print(f"ends equal to the bit      {figures.same_ends} of {args.runs}, resumed at least twice each")
    print(f"finished run left alone    {figures.finished_left_alone} of 1")
    print(f"disk full while saving     {told}")
    for rank, (seconds, told) in enumerate(losses):
        print(f"rank {rank} of 2 killed          the run ended in {seconds:.1f} s, resumes to the bit: {told}")
    print(f"in {time.monotonic() - begin:.0f} s")
    good = (
        figures.resumed == figures.kills >= 2 * args.runs
        and figures.inside.total() >= args.runs
        and not figures.broken
        and not figures.lost
        and figures.same_ends == args.runs
        and figures.finished_left_alone == 1
        and all(seconds < END_SECONDS for seconds, _ in losses)
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
