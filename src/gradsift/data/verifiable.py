"""The embedded world: seeded instruction examples whose answers can be checked exactly.

There are thirteen families of small tasks (copy, sort, add, look up ...) over a closed vocabulary of about 240 words.
Texts are words separated by single spaces, so a word-level tokenizer can restore each text exactly. Some rows are
spoilt on purpose: their answers are wrong. The label of each row states whether its answer is right and, if not, how it
was spoilt. So it is known exactly how many spoilt rows a method selects.

Contradictory twins are two rows with the same prompt and different answers. The row with the wrong answer is labelled
`contradictory` and is spoilt. The row with the right answer is labelled `clean`, although a method that does not know
the task cannot tell which of the two rows is right. Duplicates repeat clean rows. Duplicates are redundant, not spoilt,
and are labelled `exact_duplicate` or `near_duplicate`.

The option `delayed` adds two families about operations whose names have no meaning before training. A `named` row shows
what one operation does, and a `chained` row applies two operations one after the other. So `chained` rows are hard to
learn before the names are known. How a method should score such rows (delayed credit) is an open question of the
GRADFILTERING paper.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction

from gradsift.errors import ConfigError

SPOILT = ("wrong_answer", "mismatched_answer", "truncated", "contradictory")
DUPLICATES = ("exact_duplicate", "near_duplicate")

NUMBERS = tuple(str(n) for n in range(40))
# Syllables that are English words are left out, because instructions and answers may use them.
SYLLABLES = tuple(c + v for c in "bdfklnpr" for v in "aeiou" if c + v not in ("be", "do", "no"))
CAPITALS = tuple(syllable.upper() for syllable in SYLLABLES)
MARK = ";"  # separates the words that a question is about from the list of words

MAX_TASKS = 4_800  # below 13 x 400: `add` has 400 different questions, and every 13th task is of this family


@dataclass(frozen=True)
class Label:
    """The label of a row: its quality, and the family of its task."""

    quality: str  # clean, or one of SPOILT or DUPLICATES
    family: str  # name of the kind of task


@dataclass(frozen=True)
class World:
    """A generated dataset: `rows` in Alpaca's format, `labels` in the same order, and benchmark questions with answers.

    The keys of a benchmark item are item_id, instruction, input, reference and family.
    """

    rows: list[dict[str, str]]
    labels: list[Label]
    benchmark: list[dict[str, str]]


@dataclass(frozen=True)
class _Family:
    """A kind of task: `draw` draws the arguments of a task, and `solve` returns the right answer to the task."""

    name: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]

    @property
    def operator(self) -> str:
        """The word that names the family in the pretraining text."""
        return f"#{self.name}"

    @property
    def wordings(self) -> list[str]:
        """The instructions that ask for a task of the family."""
        return _WORDINGS[self.name].split(" / ")


@dataclass(frozen=True)
class Task:
    """One question: a family of tasks, the arguments, and one of the family's wordings."""

    family: _Family
    arguments: str
    wording: str

    @property
    def question(self) -> tuple[str, str]:
        """The name of the family and the arguments; both are the same for each wording of the question."""
        return self.family.name, self.arguments

    @property
    def prompt(self) -> tuple[str, str]:
        """Instruction and input."""
        if "{}" in self.wording:
            return self.wording.replace("{}", self.arguments), ""
        return self.wording, self.arguments

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.family.solve(self.arguments)

    def row(self, output: str) -> dict[str, str]:
        return {"instruction": self.prompt[0], "input": self.prompt[1], "output": output}

    def item(self, item_id: str) -> dict[str, str]:
        """Return the task as an item of a benchmark."""
        prompt = {"instruction": self.prompt[0], "input": self.prompt[1]}
        return {"item_id": item_id, **prompt, "reference": self.answer, "family": self.family.name}

    def reworded(self, rng: random.Random) -> Task:
        return replace(self, wording=rng.choice([each for each in self.family.wordings if each != self.wording]))


def _sampled(words: Sequence[str], low: int, high: int) -> Callable[[random.Random], str]:
    """Return a function that draws `low` to `high` different words from `words` and joins them with spaces."""
    return lambda rng: " ".join(rng.sample(words, rng.randint(low, high)))


_draw_words = _sampled(SYLLABLES, 3, 4)
_draw_numbers = _sampled(NUMBERS, 3, 4)


def _draw_membership(rng: random.Random) -> str:
    word, *others = rng.sample(SYLLABLES, rng.randint(4, 5))
    if rng.random() < 0.5:
        others[rng.randrange(len(others))] = word
    return " ".join([word, MARK, *others])


def _draw_replacement(rng: random.Random) -> str:
    new, *words = rng.sample(SYLLABLES, rng.randint(3, 4))
    return " ".join([rng.choice(words), new, MARK, *words])


def _draw_table(rng: random.Random) -> str:
    keys = rng.sample(SYLLABLES, rng.randint(2, 3))
    values = rng.sample(NUMBERS, len(keys))
    pairs = (word for pair in zip(keys, values, strict=True) for word in pair)
    return " ".join([rng.choice(keys), MARK, *pairs])


def _about(solve: Callable[[list[str], list[str]], list[str]]) -> Callable[[str], str]:
    """Return a function that splits a text at `MARK`, and calls `solve` with the words before and after the mark."""

    def solved(arguments: str) -> str:
        asked, words = arguments.split(f" {MARK} ")
        return " ".join(solve(asked.split(), words.split()))

    return solved


def _swap_ends(arguments: str) -> str:
    first, *middle, last = arguments.split()
    return " ".join([last, *middle, first])


# The operations of the delayed families by name. The names are in the vocabulary, but only `named` rows show what they
# mean. The pretraining text does not contain the operations.
OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "BA": lambda words: words[::-1],
    "DI": lambda words: [words[-1], *words[1:-1], words[0]],
    "FO": lambda words: words[1:],
    "KU": lambda words: [word.upper() for word in words],
    "LE": lambda words: [*words[1:], words[0]],
}


def _draw_operated(names: Sequence[str], rng: random.Random) -> str:
    # The number of words is always 4. `randint` is called because it takes bits of the random stream, on which recorded
    # datasets depend.
    return " ".join([*names, MARK, *rng.sample(SYLLABLES, rng.randint(4, 4))])


@_about
def _operate(names: list[str], words: list[str]) -> list[str]:
    """Apply the operations in `names` to `words`, the first name first."""
    for name in names:
        words = OPERATIONS[name](words)
    return words


@_about
def _replace(pair: list[str], words: list[str]) -> list[str]:
    old, new = pair
    return [new if word == old else word for word in words]


# The instructions of each family. An instruction with {} holds the arguments, and the row's input is then empty.
_WORDINGS = {
    "count": "how many words are in the list / count the following words / give the length of the list / how many "
    "words are there in {}",
    "copy": "write the words as they are / copy the following list / say the same words again / give back the list "
    "unchanged",
    "add": "add the two numbers / what is the sum of the numbers / give the total of the numbers / work out the sum "
    "of {}",
    "reverse": "write the words from back to front / reverse the following list / say the words in the opposite "
    "order / turn the list around",
    "max": "find the largest number / which number is the biggest / give the highest of the numbers / what is the "
    "maximum of {}",
    "sort": "put the numbers in rising order / sort the following numbers / order the numbers from small to large / "
    "write the numbers so that they grow",
    "first": "which word comes first / give the first word of the list / say the word at the start / with which word "
    "does {} begin",
    "upper": "write the words in capital letters / change the following list to upper case / say the words in big "
    "letters / make every letter a capital",
    "last": "which word comes last / give the final word of the list / say the word at the end / with which word "
    "does {} end",
    "replace": "replace one word by another / exchange the word in the list / put the new word for the old / change "
    "the list as told",
    "member": "is the word in the list / does the list hold the word / say yes or no to the word / find out if the "
    "word is there",
    "repeat": "repeat the words as often as told / write the list many times / say the words over and over / give "
    "the list several times in a row",
    "look_up": "look up the word in the table / which number belongs to the word / give the value of the key / find "
    "the number after the word",
    "named": "change the list as the capital word say / work out what the capital word make of the list / write the "
    "list as told in big letters / put the words in the order of the capital word",
    "chained": "change the list as two capital words say / work out what the two words make of the list / change the "
    "list by one capital word and by another / write the list as told by two capital words in a row",
}

# Tasks are drawn from the families in this order, in which families with one-word answers alternate with others. So
# even a small world has enough answers of several words, which can be truncated.
_FAMILIES = (
    _Family("count", _sampled(SYLLABLES, 2, 6), lambda text: str(len(text.split()))),
    _Family("copy", _draw_words, lambda text: text),
    _Family(
        "add", lambda rng: f"{rng.randrange(20)} {rng.randrange(20)}", lambda text: str(sum(map(int, text.split())))
    ),
    _Family("reverse", _draw_words, lambda text: " ".join(reversed(text.split()))),
    _Family("max", _draw_numbers, lambda text: str(max(map(int, text.split())))),
    _Family("sort", _draw_numbers, lambda text: " ".join(sorted(text.split(), key=int))),
    _Family("first", _draw_words, lambda text: text.split()[0]),
    _Family("upper", _draw_words, lambda text: text.upper()),
    _Family("last", _draw_words, lambda text: text.split()[-1]),
    _Family("replace", _draw_replacement, _replace),
    _Family("member", _draw_membership, _about(lambda asked, words: ["yes" if asked[0] in words else "no"])),
    _Family(
        "repeat",
        lambda rng: f"{rng.randint(2, 3)} {MARK} {_sampled(SYLLABLES, 2, 3)(rng)}",
        _about(lambda times, words: words * int(times[0])),
    ),
    _Family("look_up", _draw_table, _about(lambda key, table: [table[table.index(key[0]) + 1]])),
)

# Skills in the pretraining text that no instruction of the dataset asks for.
_OTHER_FAMILIES = (
    _Family("second", _draw_words, lambda text: text.split()[1]),
    _Family("rest", _draw_words, lambda text: " ".join(text.split()[1:])),
    _Family("swap_ends", _draw_words, _swap_ends),
    _Family("min", _draw_numbers, lambda text: str(min(map(int, text.split())))),
    _Family("falling", _draw_numbers, lambda text: " ".join(sorted(text.split(), key=int, reverse=True))),
)

# The pretraining text has no tasks of the delayed families, and their wordings use only words of the other families. So
# worlds with and without delayed families have the same vocabulary and use the same backbones.
_NAMED = _Family("named", lambda rng: _draw_operated([rng.choice(list(OPERATIONS))], rng), _operate)
_CHAINED = _Family("chained", lambda rng: _draw_operated(rng.sample(list(OPERATIONS), 2), rng), _operate)
DEFINING = _NAMED.name  # the family whose rows show what a name does
DELAYED = _CHAINED.name  # the family whose rows can only be learnt after the names

FAMILIES = tuple(family.name for family in _FAMILIES)
_BY_NAME = {family.name: family for family in (*_FAMILIES, _NAMED, _CHAINED)}
_OTHER_SHARE = 0.1  # share of the pretraining text that is about `_OTHER_FAMILIES`

VOCABULARY: tuple[str, ...] = (
    *NUMBERS,
    *SYLLABLES,
    *CAPITALS,
    MARK,
    "yes",
    "no",
    *(family.operator for family in (*_FAMILIES, *_OTHER_FAMILIES)),
    *sorted(
        {word for family in _FAMILIES for wording in family.wordings for word in wording.split()} - {"{}", "yes", "no"}
    ),
)


def generate(
    *,
    size: int = 3000,
    spoilt: float = 0.5,
    duplicates: float = 0.06,
    benchmark_items: int = 780,
    delayed: float = 0.0,
    seed: int = 0,
) -> World:
    """Draw a dataset and its benchmark; the same arguments give the same world on every machine.

    The families in FAMILIES are equally frequent before rows are spoilt. Only an answer of several words can be
    truncated, so families with such answers have more truncated rows, and fewer rows that are spoilt in other ways.

    Args:
        size: number of rows, N.
        spoilt: share of rows with a wrong answer. The kinds in SPOILT have equal numbers of rows, or differ by one row.
        duplicates: share of rows that repeat a clean row: half of these rows repeat it word for word, the others in
            another wording.
        benchmark_items: number of questions with right answers; none has the same family and arguments as a row.
        delayed: share of `chained` tasks in the rows and in the benchmark; the share of `named` tasks is half as large.

    Raises:
        ConfigError: no world can have these sizes and shares.
    """
    if size + benchmark_items > MAX_TASKS:
        raise ConfigError(
            f"size={size}, benchmark_items={benchmark_items}: this world has {MAX_TASKS} tasks for both together; "
            "lower one of them"
        )
    n_spoilt, n_duplicates = round(size * spoilt), round(size * duplicates)
    n_clean = size - n_spoilt - n_duplicates
    counts = divided(n_spoilt, SPOILT) | divided(n_duplicates, DUPLICATES)
    if n_clean < max(counts["contradictory"], n_duplicates):
        raise ConfigError(
            f"spoilt={spoilt}, duplicates={duplicates}: {max(n_clean, 0)} clean rows are left, but "
            f"{counts['contradictory']} contradictory rows and {n_duplicates} duplicates need a clean row each; lower "
            "spoilt or duplicates"
        )
    rng = random.Random(f"verifiable rows {seed}")
    own_prompt = n_clean + n_spoilt - counts["contradictory"]  # number of rows that do not repeat a clean row's task
    tasks = _draw_tasks(own_prompt + benchmark_items, delayed, rng)
    asked, tasks = tasks[:benchmark_items], tasks[benchmark_items:]
    clean, to_spoil = tasks[:n_clean], tasks[n_clean:]

    rows = [(task, task.answer, "clean") for task in clean]
    rows += _spoil(to_spoil, [task.answer for task in tasks], counts, rng)
    twins = rng.sample(clean, counts["contradictory"])
    rows += [(task, wrong_answer(task.answer, rng), "contradictory") for task in twins]
    repeated = rng.sample(clean, n_duplicates)
    rows += [(task, task.answer, "exact_duplicate") for task in repeated[: counts["exact_duplicate"]]]
    rows += [(task.reworded(rng), task.answer, "near_duplicate") for task in repeated[counts["exact_duplicate"] :]]
    rng.shuffle(rows)
    labels = [Label(quality, task.family.name) for task, _, quality in rows]
    benchmark = [task.item(f"verifiable-{index:04d}") for index, task in enumerate(asked)]
    return World([task.row(output) for task, output, _ in rows], labels, benchmark)


def _draw_tasks(count: int, delayed: float, rng: random.Random) -> list[Task]:
    """Draw `count` tasks from all families in turn. No two tasks have both the same family and the same arguments.

    The share `delayed` of the tasks belongs to the family `chained`, and half this share to the family `named`. The
    tasks of these two families are spread evenly over the list.
    """
    plain, about_names = itertools.cycle(_FAMILIES), itertools.cycle((_CHAINED, _NAMED, _CHAINED))
    share = Fraction(str(delayed)) * Fraction(3, 2)
    tasks: list[Task] = []
    seen: set[tuple[str, str]] = set()
    for index in range(count):
        family = next(about_names if int((index + 1) * share) > int(index * share) else plain)
        arguments = _draw_unseen(family, seen, rng)
        tasks.append(Task(family, arguments, rng.choice(family.wordings)))
    return tasks


def _draw_unseen(family: _Family, seen: set[tuple[str, str]], rng: random.Random) -> str:
    """Draw arguments of a family until (family name, arguments) is not in `seen`, and add this pair to `seen`."""
    arguments = family.draw(rng)
    while (family.name, arguments) in seen:
        arguments = family.draw(rng)
    seen.add((family.name, arguments))
    return arguments


def _spoil(
    to_spoil: Sequence[Task], answers: Sequence[str], counts: dict[str, int], rng: random.Random
) -> list[tuple[Task, str, str]]:
    """Return (task, spoilt answer, kind of SPOILT) for each task in `to_spoil`, in a random order.

    `counts` has the number of tasks of each kind. A mismatched answer is the right answer to another task, drawn from
    `answers`.
    """
    order = rng.sample(to_spoil, len(to_spoil))
    order.sort(key=lambda task: " " not in task.answer)  # answers that can be truncated come first; the sort is stable
    others = order[counts["truncated"] :]
    rng.shuffle(others)
    rows = []
    for task in order[: counts["truncated"]]:
        words = task.answer.split()
        rows.append((task, " ".join(words[: rng.randrange(1, len(words))]), "truncated"))
    for task in others[: counts["wrong_answer"]]:
        rows.append((task, wrong_answer(task.answer, rng), "wrong_answer"))
    for task in others[counts["wrong_answer"] :]:
        foreign = [answer for answer in answers if answer != task.answer]
        # only a world of a few rows has no other answer
        answer = rng.choice(foreign or ["no" if task.answer == "yes" else "yes"])
        rows.append((task, answer, "mismatched_answer"))
    return rows


def pretraining_rows(count: int, *, seed: int = 0, instructed_share: float = 0.006) -> list[tuple[str, str]]:
    """Draw (prompt, response) pairs that teach a backbone to solve the tasks, but hardly to follow the instructions.

    A prompt names the family by its operator ("#sort\\n7 3 9\\n"). The operator is repeated one to seven times, so that
    the arguments are at the same positions as after an instruction. This matters because a model with absolute position
    embeddings learns a task only for the positions at which it saw the arguments. A tenth of the pairs belongs to
    families that are not in the dataset.

    Args:
        instructed_share: share of the pairs that are worded as in the dataset. The number of such pairs is this share
            of `count`, rounded; it is not random.
    """
    if instructed_share + _OTHER_SHARE > 1:
        raise ConfigError(
            f"instructed_share={instructed_share} is too large beside the other {_OTHER_SHARE} of the pretraining "
            f"text; give at most {1 - _OTHER_SHARE}"
        )
    rng = random.Random(f"verifiable pretraining {seed}")
    n_instructed, n_other = round(count * instructed_share), round(count * _OTHER_SHARE)
    rows = []
    for index in range(count):
        family = rng.choice(_OTHER_FAMILIES if n_instructed <= index < n_instructed + n_other else _FAMILIES)
        task = Task(family, family.draw(rng), _operators(family, rng))
        if index < n_instructed:
            task = replace(task, wording=rng.choice(family.wordings))
        rows.append((plain_prompt(*task.prompt), task.answer))
    rng.shuffle(rows)
    return rows


def _operators(family: _Family, rng: random.Random) -> str:
    return " ".join([family.operator] * rng.randint(1, 7))


def terse_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Draw benchmark items that are worded as in the pretraining text.

    No two items have both the same family and the same arguments. A backbone can answer these questions before it is
    finetuned, and may lose this ability by finetuning.
    """
    rng = random.Random(f"verifiable terse {seed}")
    families = itertools.cycle((*_FAMILIES, *_OTHER_FAMILIES))
    seen: set[tuple[str, str]] = set()
    items = []
    for index, family in enumerate(itertools.islice(families, count)):
        task = Task(family, _draw_unseen(family, seen, rng), _operators(family, rng))
        items.append(task.item(f"terse-{index:04d}"))
    return items


def further_rows(family: str, count: int, taken: Set[tuple[str, str]], seed: int) -> list[dict[str, str]]:
    """Draw `count` clean rows of one family.

    The (instruction, input) pairs of the rows are all different, and none of them is in `taken`.

    Raises:
        ConfigError: the family is unknown, or 200 x `count` draws gave fewer than `count` rows.
    """
    if family not in _BY_NAME:
        raise ConfigError(f"family={family!r} is not in this world; one of {', '.join(FAMILIES)}")
    rng = random.Random(f"verifiable further {family} {seed}")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for _ in range(200 * count):
        task = Task(_BY_NAME[family], _BY_NAME[family].draw(rng), rng.choice(_BY_NAME[family].wordings))
        if task.prompt not in taken:
            rows.setdefault(task.prompt, task.row(task.answer))
        if len(rows) == count:
            return list(rows.values())
    raise ConfigError(f"family={family!r} has no {count} questions left beside the data's; ask for fewer")


def plain_prompt(instruction: str, input: str) -> str:
    """Return the prompt in the `plain` template."""
    return instruction + "\n" + (input + "\n" if input else "")


def task_of(instruction: str, input: str) -> Task:
    """Return the task that a prompt of this world asks for; raise ConfigError for an unknown prompt."""
    for family in _BY_NAME.values():
        for wording in family.wordings:
            head, hole, tail = wording.partition("{}")
            if not hole and instruction == wording:
                return Task(family, input, wording)
            if hole and instruction.startswith(head) and instruction.endswith(tail):
                return Task(family, instruction[len(head) : len(instruction) - len(tail)], wording)
    raise ConfigError(f"instruction={instruction!r} is no wording of this world; pass an unchanged row of it")


def wrong_answer(answer: str, rng: random.Random) -> str:
    """Return a wrong answer with as many words as the right `answer`, of the same kind (numbers, syllables, ...)."""
    right = answer.split()
    if right[0] in ("yes", "no"):
        return "no" if right[0] == "yes" else "yes"
    kind = next(words for words in (NUMBERS, SYLLABLES, CAPITALS) if right[0] in words)
    while True:
        wrong = [rng.choice(kind) for _ in right]
        if wrong != right:
            return " ".join(wrong)


def garbled(answer: str, rng: random.Random) -> str:
    """Return as many random words of the vocabulary as the answer has; the result always differs from the answer."""
    while True:
        words = " ".join(rng.choice(VOCABULARY) for _ in answer.split())
        if words != answer:
            return words


def answers_match(output: str, reference: str) -> bool:
    """Return whether two answers have the same words in the same order; the white space between words may differ."""
    return output.split() == reference.split()


def effective_families(families: Sequence[str]) -> float:
    """Return the effective number of families: exp of the entropy of their shares, or 0 if `families` is empty."""
    shares = [count / len(families) for count in Counter(families).values()]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def divided(total: int, kinds: Sequence[str]) -> dict[str, int]:
    """Divide `total` equally among `kinds`. If it cannot be divided equally, the first parts are larger by 1."""
    part, rest = divmod(total, len(kinds))
    return {kind: part + (index < rest) for index, kind in enumerate(kinds)}
