"""Several processes of one run: what one does for all, and that none is left waiting for one that is gone."""

import atexit
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from dmm.errors import UserError
from dmm.files.claims import claimed
from dmm.models.devices import find_device
from dmm.training.ranks import leave

Made = TypeVar("Made")

# Whichever process is done with its data first waits for the others in a collective, for hours if need be. What ends
# its wait where one dies is the launcher, or the connection that it closes.
_TIMEOUT = timedelta(days=7)
_HANG_SECONDS = 20.0  # launchers kill 30 s after they have asked
_PARTING_SECONDS = 0.5


def join_processes(device: str | None = None) -> PartialState:
    """Find the other processes of the run, if a launcher has started some, and the device of this one.

    Args:
        device: of a process by itself, by its name; by default the best there is. A launcher deals them out.
    Raises: UserError: there are others, but they did not find each other, or a device was named; no such device.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if device is not None and started > 1:
        raise UserError(
            f"--device {device} is for one process, and the launcher started {started}, each with a device of its own. "
            "Leave it out."
        )
    chosen = None if device is None else find_device(device)
    # on a machine without an accelerator, processes look for each other only if they are told to use the CPU
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=_TIMEOUT) if started > 1 else PartialState(cpu=cpu)
    if state.num_processes != started:
        raise UserError(
            f"The launcher started {started} processes, but this one found {state.num_processes}, so that they would "
            "overwrite each other's work. Launch with torchrun, or with accelerate launch."
        )
    if chosen is not None:
        state.device = chosen  # what accelerate asks from then on
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
    if started > 1:
        atexit.register(_part)
    return state


def _part() -> None:
    """Leave the other processes: one that ends with its connections open aborts, now and then, in their threads.

    Such a thread lets go of its last tensors only after it has told that they have come, for which it needs an
    interpreter that still runs: where it finds none, it ends the process ("terminate called without an active
    exception"). The group joins its threads once nothing holds it; what still does so gets a moment.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # models that were trained in parallel hold the group, in circles
        torch.distributed.destroy_process_group()
        time.sleep(_PARTING_SECONDS)


def on_main(work: Callable[[], Made]) -> Made:
    """What ``work`` makes in the main process, in all of them.

    Args:
        work: makes something that can be sent between processes.
    Raises: what ``work`` does, in the main process; SystemExit in the others, which leave the telling to it.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    made: list[Any] = [None, False]
    try:
        if state.is_main_process:
            made = [work(), True]
    finally:
        # also on the way out with an error: the others must hear of it
        try:
            broadcast_object_list(made)
        except RuntimeError:  # the main process has gone without a word
            if state.is_main_process:
                raise
    if not made[1]:
        leave()
    return made[0]


def on_all(work: Callable[[], Made]) -> Made:
    """What ``work`` makes in this process, once all have made theirs.

    Raises: what ``work`` does, in the first of the processes in which it does; SystemExit in the others, which leave
        the telling to that one.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    error: Exception | None = None
    try:
        made = work()
    except Exception as raised:  # the others must hear of it before it goes on its way
        error = raised
    try:
        failed = gather_object([error is not None])
    except RuntimeError:  # one has gone without a word
        failed = [True]
        if error is not None:
            raise error from None
    if error is not None and failed.index(True) == state.process_index:
        raise error
    if any(failed):
        leave()
    return made


@contextmanager
def claimed_by_main(output: Path) -> Iterator[None]:
    """:func:`dmm.files.claims.claimed` by the main process, for all of the run."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(claimed(output)))
        yield


@contextmanager
def telling_of_loss(step: int) -> Iterator[None]:
    """Within the block, which belongs to ``step``, a process that is gone is told of.

    Raises: UserError: naming this process and the step, where another one does not answer.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        raise UserError(
            f"Rank {state.process_index} of {state.num_processes}, step {step}: another process of the run is gone "
            f"({str(error).splitlines()[0]}). The launcher tells which; --resume goes on from the last checkpoint."
        ) from error


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT and SIGTERM are noted rather than obeyed; what is given tells whether one came.

    A process that waits in a collective for another one that is gone cannot note anything: it ends, with a word.
    """
    noted = threading.Event()
    before = {s: signal.signal(s, lambda *_: noted.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    # Python calls a handler between two of its instructions, which a blocked call never comes to; the byte is written
    # to this socket at once
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_end_if_blocked, args=(receiver, noted), daemon=True)
    watch.start()
    try:
        yield noted.is_set
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()
        watch.join()
        receiver.close()


def _end_if_blocked(receiver: socket.socket, noted: threading.Event) -> None:
    state = PartialState()
    if not receiver.recv(1) or state.num_processes == 1 or noted.wait(_HANG_SECONDS):
        return
    print(
        f"dmm: error: Rank {state.process_index} of {state.num_processes} was asked to stop, and has waited "
        f"{_HANG_SECONDS:g} s in its step for a process that does not answer. --resume goes on from the last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _is_of_connection(error: RuntimeError) -> bool:
    # gloo's errors are plain RuntimeErrors that name its source files
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
