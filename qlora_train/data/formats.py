"""Records -> Rows: which format the columns have, and the reader of each format.

======================  ==============================================================================================
format                  columns (those in brackets may be missing)
======================  ==============================================================================================
`messages`              messages, a list of {role, content, ...} (*)
`conversations`         conversations, a list of {from, value} or {role, content} (*)
`prompt_completion`     prompt and completion: two strings, joined as they are, or two lists of messages (*)
`alpaca`                instruction, output: one user and one assistant turn (input, history, *)
`question_answer`       question, answer: one user and one assistant turn (context, *)
`text`                  text
`preference`            chosen, rejected: two answers, or two whole conversations (prompt, score_chosen, score_rejected, *)
`question_preference`   question, chosen, rejected: one user turn and two answers (context, input, scores as above, *)
`openai_preference`     input: {messages, tools}; preferred_output, non_preferred_output: lists of {role, content, ...}
`unpaired_preference`   prompt, completion as in `prompt_completion`; label: whether the completion is desirable (*)
`unpaired_messages`     messages, of which the last is the answer; label (*)
`tokens`                input_ids (labels, attention_mask, position_ids, loss_mask, completion_mask, assistant_masks)
======================  ==============================================================================================

(*) is tools, system, chat_template_kwargs: functions, the first turn, and variables for the chat template. `input` follows
the instruction, `context` precedes the question, each with a blank line between. `history` is a list of [question,
answer], earlier turns that are trained too. `rejected` may be a list of answers. The columns decide the format. Where they
fit several and none reads all that the others read, the file is refused: a guess would train on the wrong half.

A missing column is an error at once: every row has it. A value that cannot be used makes its row unusable, with a reason
that does not quote the row, so that equal reasons can be counted.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_train.config.objectives import DatasetType, objectives_of
from qlora_train.data.column_hints import as_yaml, preference_columns, prompt_columns, rename_hint, unpaired_columns
from qlora_train.data.pair_layouts import SCORES, lacks_prompt
from qlora_train.data.readers.chunk import header_text
from qlora_train.data.types import Record, Row
from qlora_train.utils.errors import ConfigError, DataError
from qlora_train.utils.lazy_import import import_function

log = logging.getLogger("qlora_train")


@dataclass(frozen=True, slots=True)
class Format:
    """A format.

    Attributes:
        function: `module:name` in this package; reads a row by the names of these columns.
        required: columns.
        optional: columns.
        dataset_type: the objectives' type of data set that it has.
    """

    function: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    dataset_type: DatasetType = "language_modeling"

    def reader(self) -> Callable[[str, Mapping[str, Any]], Row]:
        """Import the function, which takes a row's location and its values by column."""
        reader: Callable[[str, Mapping[str, Any]], Row] = import_function(f"qlora_train.data.{self.function}")
        return reader

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional

    def file_columns(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Map the format's columns to the file's, which `data.columns` may rename.

        A column of the file that is renamed to another name is no longer read under its own.
        """
        renamed = {column: columns[column] for column in self.columns if column in columns}
        taken = set(renamed.values())
        return {
            column: renamed.get(column, column) for column in self.columns if column in renamed or column not in taken
        }

    def columns_read(self, record: Record, columns: Mapping[str, str]) -> set[str]:
        """Return the columns of a record that are read."""
        return {name for name in self.file_columns(columns).values() if name in record.values}

    def fits(self, record: Record, columns: Mapping[str, str]) -> bool:
        """Return whether a record has all required columns."""
        in_file = self.file_columns(columns)
        return all(in_file.get(column) in record.values for column in self.required)


CONVERSATION_COLUMNS = ("tools", "system", "chat_template_kwargs")
"""Optional columns of every format of conversations."""
ROWS_OF_TYPE: Mapping[str, str] = {
    "language_modeling": "rows with one answer",
    "preference": "pairs of a chosen and a rejected answer",
    "unpaired_preference": "answers with a label",
}
"""Type of data set -> its rows, for messages."""
MASK_COLUMNS = ("loss_mask", "completion_mask", "assistant_masks")
FORMATS: dict[str, Format] = {
    "messages": Format("format_readers:from_messages", ("messages",), CONVERSATION_COLUMNS),
    "conversations": Format("format_readers:from_conversations", ("conversations",), CONVERSATION_COLUMNS),
    "prompt_completion": Format(
        "format_readers:from_prompt_completion", ("prompt", "completion"), CONVERSATION_COLUMNS
    ),
    "alpaca": Format(
        "format_readers:from_alpaca", ("instruction", "output"), ("input", "history", *CONVERSATION_COLUMNS)
    ),
    "question_answer": Format(
        "format_readers:from_question_answer", ("question", "answer"), ("context", *CONVERSATION_COLUMNS)
    ),
    "text": Format("format_readers:from_text", ("text",)),
    "preference": Format(
        "preference_rows:from_preference",
        ("chosen", "rejected"),
        ("prompt", *SCORES, *CONVERSATION_COLUMNS),
        "preference",
    ),
    "question_preference": Format(
        "preference_rows:from_question_preference",
        ("question", "chosen", "rejected"),
        ("context", "input", *SCORES, *CONVERSATION_COLUMNS),
        "preference",
    ),
    "openai_preference": Format(
        "preference_rows:from_openai_preference",
        ("input", "preferred_output", "non_preferred_output"),
        dataset_type="preference",
    ),
    "unpaired_preference": Format(
        "unpaired_rows:from_unpaired_preference",
        ("prompt", "completion", "label"),
        CONVERSATION_COLUMNS,
        "unpaired_preference",
    ),
    "unpaired_messages": Format(
        "unpaired_rows:from_unpaired_messages", ("messages", "label"), CONVERSATION_COLUMNS, "unpaired_preference"
    ),
    "tokens": Format(
        "pretokenized:read_token_row", ("input_ids",), ("labels", "attention_mask", "position_ids", *MASK_COLUMNS)
    ),
}


def formats_of(dataset_type: DatasetType) -> dict[str, Format]:
    """Return the formats of a type of data set; a pair is also two answers without one."""
    types = (dataset_type, "preference") if dataset_type == "unpaired_preference" else (dataset_type,)
    return {name: row for name, row in FORMATS.items() if row.dataset_type in types}


def check_renames(
    format_name: str, columns: Mapping[str, str], dataset_type: DatasetType, key: str = "data.columns"
) -> None:
    """Check the setting `key`, column names -> the file's, against a format, or against all of its type for `auto`.

    Raises:
        ConfigError: the format has no such column, or two of its columns have the same name in the file.
    """
    names = list(formats_of(dataset_type)) if format_name == "auto" else [format_name]
    allowed = list(dict.fromkeys(column for name in names for column in FORMATS[name].columns))
    for column in columns:
        if column not in allowed:
            raise ConfigError(
                f"{key}: {column!r} is not a column of the format {format_name}; allowed: {', '.join(allowed)} "
                "(the format's name comes first, then the file's)"
            )
    for name in names:
        owners: dict[str, str] = {}
        for column in FORMATS[name].columns:
            if column in columns and owners.setdefault(columns[column], column) != column:
                raise ConfigError(
                    f"{key}: {owners[columns[column]]} and {column} are both called {columns[column]}; expected a column "
                    "of its own for each"
                )


def recognise(record: Record, format_name: str, columns: Mapping[str, str], dataset_type: DatasetType) -> str:
    """Return the format of a source from its first record, and log it with the columns that are not used.

    Where the columns fit several formats, those with a renamed column (`columns`) are preferred.

    Raises:
        DataError: the columns fit no format of the type that the objective trains on, or several.
    """
    name = _recognised(record, columns, dataset_type) if format_name == "auto" else format_name
    if name not in formats_of(dataset_type):
        other = _other_type(FORMATS[name].dataset_type, dataset_type, {})
        raise DataError(f"{record.where}: the format {name} is for another objective; {other}")
    if name == "preference":
        _check_prompt(record, columns, is_chosen=format_name != "auto")
    used = FORMATS[name].file_columns(columns).values()
    unused = header_text([column for column in record.values if column not in used])
    log.debug("%s: format %s%s", record.where, name, f"; columns not used: {unused}" * bool(unused))
    idle = ", ".join(f"{column}: {file}" for column, file in columns.items() if column not in FORMATS[name].columns)
    if idle:
        log.warning(
            "%s: read as %s, where data.columns {%s} has no effect; set data.format if another one is meant",
            record.where, name, idle,
        )  # fmt: skip
    return name


def _check_prompt(record: Record, columns: Mapping[str, str], *, is_chosen: bool) -> None:
    """Refuse a source of pairs without prompts, with the renames that read one; `is_chosen`: by `data.format`."""
    in_file = FORMATS["preference"].file_columns(columns)
    chosen = record.values.get(in_file["chosen"])
    if in_file["prompt"] in record.values or not lacks_prompt(chosen):
        return
    renames = prompt_columns(record.values)
    if is_chosen and "question" in renames:  # the format has no such column
        renames = {"prompt": renames["question"]}
    hint = "expected a column prompt beside them"
    if renames:
        hint = f"rename with data.columns: {as_yaml({**renames, **columns})}"
    raise DataError(
        f"{record.where}: found the columns {header_text(list(record.values))}: answers without their prompt; {hint}"
    )


def _other_type(dataset_type: DatasetType, wanted: DatasetType, columns: Mapping[str, str]) -> str:
    """Return the advice for rows of another type than the objective's, to append to a message."""
    first, *others = objectives_of(dataset_type).split(", ")
    family = " (or another of its family)" if others else ""
    renames = f" and data.columns: {as_yaml(columns)}" if columns else ""
    return f"set train.objective: {first}{family}{renames}, or give {ROWS_OF_TYPE[wanted]}"


def _recognised(record: Record, columns: Mapping[str, str], dataset_type: DatasetType) -> str:
    allowed = formats_of(dataset_type)
    fitting = [name for name, it in allowed.items() if it.fits(record, columns)]
    renamed = [
        name for name in fitting if any(columns.get(column) in record.values for column in FORMATS[name].columns)
    ]
    fitting = renamed or fitting
    reads = {name: allowed[name].columns_read(record, columns) for name in fitting}
    fitting = [name for name in fitting if not any(reads[name] < other for other in reads.values())]
    if len(fitting) == 1:
        return fitting[0]
    found = header_text(list(record.values)) or "none"
    if fitting:
        raise DataError(
            f"{record.where}: the columns {found} fit {' and '.join(fitting)}; set data.format to the one that is meant"
        )
    pair = preference_columns(record.values)
    if "preference" not in allowed and pair is not None:
        other = _other_type("preference", dataset_type, pair)
        raise DataError(f"{record.where}: found the columns {found}: preference pairs; {other}")
    is_unpaired = dataset_type == "unpaired_preference"
    others = [name for name in FORMATS if name not in allowed and FORMATS[name].fits(record, columns)]
    others.sort(key=lambda name: FORMATS[name].dataset_type == "language_modeling")  # prompt_completion ignores label
    if others and not is_unpaired:
        other = _other_type(FORMATS[others[0]].dataset_type, dataset_type, {})
        raise DataError(f"{record.where}: found the columns {found}: the format {others[0]}; {other}")
    required = [it.required for it in allowed.values()]
    expected = ", or ".join(" + ".join(columns) for columns in required)
    renames = pair or (unpaired_columns(record.values) if is_unpaired else None)
    if renames:
        hint = f"; rename with data.columns: {as_yaml(renames)}"
    else:
        hint = "; label marks each answer, true or false" if is_unpaired else rename_hint(record.values, required)
    raise DataError(f"{record.where}: found the columns {found}; expected {expected}{hint}")
