"""The log of a run, a line of JSON for every step that is told of, and cutting it where a run goes on from earlier."""

from pathlib import Path

from dmm.errors import UserError
from dmm.files.json import parse_json
from dmm.files.outputs import new_file
from dmm.files.text import read_text


def log_until(log: Path, step: int) -> list[str]:
    """The lines of a log up to a step, with their ends; none where there is no log.

    Raises: UserError: it cannot be read, or a line is none of a log's.
    """
    if not log.exists():
        return []
    try:
        # a line that a kill has cut short is the last, and so later than any checkpoint
        lines = [f"{line}\n" for line in read_text(log).split("\n")[:-1]]
        return [line for i, line in enumerate(lines, start=1) if _step_of(line, f"'{log}', line {i}") <= step]
    except UserError as error:
        raise UserError(f"{error} Move the file away to go on without it.") from error


def cut_log(log: Path, step: int) -> None:
    """Take out of a log what was logged after the checkpoint of ``step``, from which a run goes on."""
    if log.exists():
        text = "".join(log_until(log, step))
        with new_file(log, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _step_of(line: str, told: str) -> int:
    value = parse_json(line, told)
    step = value.get("step") if isinstance(value, dict) else None
    if not isinstance(step, int):
        raise UserError(f"{told}: this is no line of a run's log, which has a 'step'.")
    return step
