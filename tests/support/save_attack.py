"""Attacks saves and the export: dies before, or fails at, each file operation in its turn.

Run by itself, without threads, so that each attack is a fork of a process that has PyTorch already.
Takes the faults to try, or tries all; `EIO/4` fails at each fourth operation alone. Prints JSON:
what was tried, and a line for each attack that lost something.
"""

import errno
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samestep.errors import CheckpointError
from samestep.train import checkpoint
from samestep.train.model_folder import save_model
from samestep.train.progress import DataFingerprint, Progress

EVENTS = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"),
    *("os.truncate", "os.link", "os.symlink", "fsync"),
}
KILLED, FAULTS = 9, ("kill", "EIO", "EACCES", "ENOSPC")


class Attack:
    """Counts the operations under a folder; at the chosen one the process dies, or it fails."""

    def __init__(self) -> None:
        self.root, self.at, self.fault, self.count = "", 0, "", 0
        sys.addaudithook(self.hook)
        self.fsync = os.fsync
        os.fsync = self.sync  # type: ignore[assignment]

    def start(self, root: Path, *, at: int, fault: str) -> None:
        self.root, self.at, self.fault, self.count = str(root), at, fault, 0

    def sync(self, descriptor: int) -> None:
        self.hook("fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
        self.fsync(descriptor)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or event not in EVENTS:
            return
        if not any(isinstance(part, str) and part.startswith(self.root) for part in arguments):
            by_descriptor = event in {"os.remove", "os.rmdir"} and isinstance(arguments[1], int)
            if not (by_descriptor and arguments[1] >= 0):
                return
        self.count += 1
        if self.count == self.at:
            if self.fault == "kill":
                os._exit(KILLED)
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), str(arguments[0]))


ATTACK = Attack()


def network(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer


def save(folder: Path, step: int, value: float) -> None:
    model, optimizer = network(value)
    data = DataFingerprint(fingerprint="abc", records=3, tokens=10, blocks=["d"])
    progress = Progress(step=step, tokens=0, seconds=0.0, skipped=0, data=data)
    checkpoint.save(folder, model, optimizer=optimizer, progress=progress, keep=1)


def kept(folder: Path) -> tuple[int, float]:
    """The step and the value of what a resumed run would start from; (0, 0): from nothing."""
    path = checkpoint.newest_intact(folder)
    if path is None:
        return 0, 0.0
    model, optimizer = network(-1.0)
    progress = checkpoint.load(path, model, optimizer=optimizer)
    (value,) = {x for weight in model.parameters() for x in weight.detach().flatten().tolist()}
    return progress.step, value


def half_replaced(folder: Path) -> None:
    """What a kill in the middle of a step saved twice leaves."""
    save(folder, 1, 2.0)
    (folder / "step-00000001").rename(folder / ".step-00000001.tmp")
    save(folder / "other", 1, 1.0)
    (folder / "other" / "step-00000001").rename(folder / ".step-00000001.old")
    (folder / "other").rmdir()


def starts_from(allowed: set[tuple[int, float]]) -> Callable[[Path], str]:
    """What is wrong with checkpoints after an attack; empty if a run starts from one of these."""

    def check(folder: Path) -> str:
        found = kept(folder)
        if found not in allowed:
            return f"{found} is left"
        save(folder, 3, 3.0)
        rest = sorted(path.name for path in folder.iterdir())
        if kept(folder) != (3, 3.0) or rest != ["step-00000003"]:
            return f"afterwards there is {rest}"
        return ""

    return check


class Exported:
    """A model whose files hold one word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def save_pretrained(self, folder: Path, state_dict: Any = None) -> None:
        Path(folder).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).write_text(self.word, encoding="utf-8")


def export(folder: Path, word: str) -> None:
    save_model(Exported(word), None, folder=folder / "model", merge=False)


def words(folder: Path) -> set[str]:
    """What the files of an exported model hold; more than one is half of two."""
    return {path.read_text(encoding="utf-8") for path in (folder / "model").glob("*")}


def check_export(folder: Path) -> str:
    """What is wrong after an attack: the model is the old one, the new one, or not there yet."""
    if words(folder) not in ({"old"}, {"new"}, set()):
        return f"the model holds {words(folder)}"
    export(folder, "next")
    rest = sorted(path.name for path in folder.iterdir())
    if words(folder) != {"next"} or rest != ["model"]:
        return f"afterwards there is {rest} with {words(folder)}"
    return ""


SCENARIOS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path], str]]]
SCENARIOS = {
    "the first save": (
        lambda folder: None,
        lambda folder: save(folder, 1, 1.0),
        starts_from({(0, 0.0), (1, 1.0)}),
    ),
    "the next step": (
        lambda folder: save(folder, 1, 1.0),
        lambda folder: save(folder, 2, 2.0),
        starts_from({(1, 1.0), (2, 2.0)}),
    ),
    "a saved step": (
        lambda folder: save(folder, 1, 1.0),
        lambda folder: save(folder, 1, 2.0),
        starts_from({(1, 1.0), (1, 2.0)}),
    ),
    "the start after a kill": (half_replaced, kept, starts_from({(1, 1.0), (1, 2.0)})),
    "the export": (
        lambda folder: folder.mkdir(),
        lambda folder: export(folder, "new"),
        check_export,
    ),
    "the export over another": (
        lambda folder: export(folder, "old"),
        lambda folder: export(folder, "new"),
        check_export,
    ),
}
"""What stands there before, what is attacked, and what may be wrong afterwards."""


def attacked(name: str, folder: Path, *, at: int, fault: str) -> tuple[bool, str]:
    """Whether the attack came before the end; and what it lost."""
    before, work, check = SCENARIOS[name]
    before(folder)
    child = os.fork()
    if not child:
        ATTACK.start(folder, at=at, fault=fault)
        problem = 1
        try:
            work(folder)
            problem = 0 if ATTACK.count < at else 2
        except CheckpointError:
            problem = 2
        finally:
            os._exit(problem)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 2, KILLED):
        return True, "an error that is not samestep's own"
    try:
        problem_found = check(folder)
    except Exception as error:
        return True, f"{type(error).__name__}: {error}"
    return code != 0 or bool(problem_found), problem_found


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # there is no disk to wait for
    tried, lost = dict.fromkeys(SCENARIOS, 0), []
    for name in SCENARIOS:
        for given in sys.argv[1:] or FAULTS:
            fault, _, every = given.partition("/")
            for at in range(1, 1000, int(every or 1)):
                folder = Path(tempfile.mkdtemp(dir=memory))
                came, problem = attacked(name, folder / "checkpoints", at=at, fault=fault)
                shutil.rmtree(folder)
                if problem:
                    lost.append(f"{name}, {fault} at operation {at}: {problem}")
                if not came:
                    break
                tried[name] += 1
    print(json.dumps({"tried": tried, "lost": lost}))


if __name__ == "__main__":
    main()
