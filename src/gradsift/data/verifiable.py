"""The embedded world: seeded instruction examples whose answers can be checked exactly.

There are thirteen families of small tasks (copy, sort, add, look up ...) over a closed vocabulary of about 240 words.
Texts are words separated by single spaces, so a word-level tokenizer loses nothing. Some of the rows are spoilt on
purpose, which means that their answers are wrong. Every row has a label, so the rows that a method selects can be
checked exactly.

A label states whether the answer of the row is right and, if not, how it was spoilt. Contradictory twins are two rows
with the same prompt and different answers. The row with the wrong answer is labelled `contradictory` and is spoilt. The
row with the right answer is labelled `clean`, though no method can distinguish the two without knowing the task.
Duplicates repeat clean rows. They are redundant, not spoilt, and have labels of their own.

With `delayed` there are two more families, about operations whose names have no meaning before training. A `named` row
shows what one name does, and a `chained` row applies two named operations one after the other. So a model can learn
`chained` rows only after it has learnt the names (delayed credit, an open question of GRADFILTERING).
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction

from gradsift.errors import ConfigError

SPOILT = ("wrong_answer", "mismatched_answer", "truncated", "contradictory")
DUPLICATES = ("exact_duplicate", "near_duplicate")
QUALITIES = ("clean", *SPOILT, *DUPLICATES)

NUMBERS = tuple(str(n) for n in range(40))
# Syllables that are English words are left out, because instructions and answers may use them.
SYLLABLES = tuple(c + v for c in "bdfklnpr" for v in "aeiou" if c + v not in ("be", "do", "no"))
CAPITALS = tuple(syllable.upper() for syllable in SYLLABLES)
MARK = ";"  # separates the words that a question is about from the list of words

MAX_TASKS = 4_800  # below 13 x 400: `add` has 400 different questions, and every 13th task is of this family


@dataclass(frozen=True)
class Label:
    """The label of a row: `quality` is one of QUALITIES, and `family` is the name of its kind of task."""

    quality: str
    family: str

    @property
    def spoilt(self) -> bool:
        """Whether training on the row teaches a wrong answer."""
        return self.quality in SPOILT


@dataclass(frozen=True)
class World:
    """A generated dataset: `rows` in Alpaca's format, `labels` in the same order, and a benchmark with right answers.

    The keys of a row are instruction, input and output. The keys of a benchmark item are item_id, instruction, input,
    reference and family.
    """

    rows: list[dict[str, str]]
    labels: list[Label]
    benchmark: list[dict[str, str]]


@dataclass(frozen=True)
class _Family:
    """A kind of task: `draw` draws the arguments of a task, and `solve` returns the right answer for arguments."""

    name: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]

    @property
    def operator(self) -> str:
        """The word that names the family in the pretraining text."""
        return f"#{self.name}"

    @property
    def wordings(self) -> tuple[str, ...]:
        """The instructions that ask for a task of the family."""
        return tuple(_WORDINGS[self.name].split(" / "))


@dataclass(frozen=True)
class _Task:
    family: _Family
    arguments: str
    wording: str

    @property
    def answer(self) -> str:
        return self.family.solve(self.arguments)


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


def _asked_and_list(arguments: str) -> tuple[list[str], list[str]]:
    """Return the words before `MARK`, which the question is about, and the words after it."""
    asked, words = arguments.split(f" {MARK} ")
    return asked.split(), words.split()


def _member(arguments: str) -> str:
    (word,), words = _asked_and_list(arguments)
    return "yes" if word in words else "no"


def _replace(arguments: str) -> str:
    (old, new), words = _asked_and_list(arguments)
    return " ".join(new if word == old else word for word in words)


def _repeat(arguments: str) -> str:
    (times,), words = _asked_and_list(arguments)
    return " ".join(words * int(times))


def _look_up(arguments: str) -> str:
    (key,), table = _asked_and_list(arguments)
    return table[table.index(key) + 1]


def _swap_ends(arguments: str) -> str:
    first, *middle, last = arguments.split()
    return " ".join([last, *middle, first])


# The operations of the delayed families by name. The names are in the vocabulary, but only `named` rows show what they
# mean; the pretraining text does not.
OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "BA": lambda words: words[::-1],
    "DI": lambda words: [words[-1], *words[1:-1], words[0]],
    "FO": lambda words: words[1:],
    "KU": lambda words: [word.upper() for word in words],
    "LE": lambda words: [*words[1:], words[0]],
}


def _draw_operated(names: Sequence[str], rng: random.Random) -> str:
    return " ".join([*names, MARK, *rng.sample(SYLLABLES, rng.randint(4, 4))])


def _operate(arguments: str) -> str:
    """Apply the operations named before `MARK`, from left to right, to the words after it; return the result."""
    names, words = _asked_and_list(arguments)
    for name in names:
        words = OPERATIONS[name](words)
    return " ".join(words)


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

# Families with one-word answers alternate with families with longer answers, and tasks are drawn in this order. So even
# a small world has enough answers of several words, which can be truncated.
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
    _Family("member", _draw_membership, _member),
    _Family("repeat", lambda rng: f"{rng.randint(2, 3)} {MARK} {_sampled(SYLLABLES, 2, 3)(rng)}", _repeat),
    _Family("look_up", _draw_table, _look_up),
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
# a world with delayed families has the same vocabulary, and uses the same backbones, as a world without them.
_NAMED = _Family("named", lambda rng: _draw_operated([rng.choice(list(OPERATIONS))], rng), _operate)
_CHAINED = _Family("chained", lambda rng: _draw_operated(rng.sample(list(OPERATIONS), 2), rng), _operate)
DEFINING = _NAMED.name  # the family whose rows show what a name does
DELAYED = _CHAINED.name  # the family whose rows can only be learnt after the names

FAMILIES = tuple(family.name for family in _FAMILIES)
_BY_NAME = {family.name: family for family in (*_FAMILIES, _NAMED, _CHAINED)}

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
    """Draw a dataset and its benchmark; equal arguments give equal worlds on every machine.

    The families in FAMILIES are equally frequent before rows are spoilt. Only an answer of several words can be
    truncated, so families with such answers have more truncated rows, and fewer rows that are spoilt in other ways.

    Args:
        size: number of rows, N.
        spoilt: share of rows with a wrong answer, divided equally (up to one row) among the kinds in SPOILT.
        duplicates: share of rows that repeat a clean row, half of them word for word, half with another wording.
        benchmark_items: number of questions with right answers; none has the same family and arguments as a row.
        delayed: share of the tasks, in rows and benchmark, that chain two named operations; half as many further tasks
            show what one name does. With 0, the world is the same, byte for byte, as in versions without this option.

    Raises:
        ConfigError: no world can have these sizes and shares.
    """
    _refuse_impossible(size, spoilt, duplicates, benchmark_items)
    n_spoilt, n_duplicates = round(size * spoilt), round(size * duplicates)
    counts = divided(n_spoilt, SPOILT) | divided(n_duplicates, DUPLICATES)
    counts["clean"] = size - n_spoilt - n_duplicates

    rng = random.Random(f"verifiable rows {seed}")
    own_prompt = counts["clean"] + n_spoilt - counts["contradictory"]  # rows that do not repeat a clean row's task
    tasks = _draw_tasks(own_prompt + benchmark_items, delayed, rng)
    asked, tasks = tasks[:benchmark_items], tasks[benchmark_items:]
    clean, to_spoil = tasks[: counts["clean"]], tasks[counts["clean"] :]

    rows = [(task, task.answer, "clean") for task in clean]
    rows += _spoil(to_spoil, [task.answer for task in tasks], counts, rng)
    twins = rng.sample(clean, counts["contradictory"])
    rows += [(task, wrong_answer(task.answer, rng), "contradictory") for task in twins]
    repeated = rng.sample(clean, n_duplicates)
    rows += [(task, task.answer, "exact_duplicate") for task in repeated[: counts["exact_duplicate"]]]
    rows += [(_reworded(task, rng), task.answer, "near_duplicate") for task in repeated[counts["exact_duplicate"] :]]
    rng.shuffle(rows)
    benchmark = [
        {
            "item_id": f"verifiable-{index:04d}",
            **dict(zip(("instruction", "input"), _asked(task), strict=True)),
            "reference": task.answer,
            "family": task.family.name,
        }
        for index, task in enumerate(asked)
    ]
    labels = [Label(quality, task.family.name) for task, _, quality in rows]
    return World([_row(task, output) for task, output, _ in rows], labels, benchmark)


def pretraining_rows(
    count: int, *, seed: int = 0, instructed_share: float = 0.006, other_share: float = 0.1
) -> list[tuple[str, str]]:
    """Draw (prompt, response) pairs that teach a backbone to solve the tasks, but hardly to follow the instructions.

    A prompt names the family by its operator ("#sort\\n7 3 9\\n"), which is repeated up to seven times. So the
    arguments stand at the same positions as after an instruction. A model with absolute position embeddings learns a
    task only for the positions at which it saw the arguments.

    Args:
        instructed_share: share of the pairs that are worded as in the dataset; their number is rounded, not drawn.
        other_share: share of the pairs of families that are not in the dataset; their number is rounded, not drawn.
    """
    if instructed_share + other_share > 1:
        raise ConfigError(
            f"instructed_share={instructed_share}, other_share={other_share}: together they are at most 1; lower one"
        )
    rng = random.Random(f"verifiable pretraining {seed}")
    n_instructed, n_other = round(count * instructed_share), round(count * other_share)
    rows = []
    for index in range(count):
        family = rng.choice(_OTHER_FAMILIES if n_instructed <= index < n_instructed + n_other else _FAMILIES)
        arguments = family.draw(rng)
        instruction, input = " ".join([family.operator] * rng.randint(1, 7)), arguments
        if index < n_instructed:
            instruction, input = _asked(_Task(family, arguments, rng.choice(family.wordings)))
        rows.append((plain_prompt(instruction, input), family.solve(arguments)))
    rng.shuffle(rows)
    return rows


def terse_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Draw questions worded as in the pretraining text; its families alternate in a fixed order.

    A backbone can answer these questions before a finetune, and may lose this ability in a finetune on instructions. No
    two rows have the same family and arguments. A row has the keys of a benchmark item.
    """
    rng = random.Random(f"verifiable terse {seed}")
    families = itertools.cycle((*_FAMILIES, *_OTHER_FAMILIES))
    seen: set[tuple[str, str]] = set()
    rows = []
    for index, family in enumerate(itertools.islice(families, count)):
        arguments = _draw_unseen(family, seen, rng)
        rows.append(
            {
                "item_id": f"terse-{index:04d}",
                "instruction": " ".join([family.operator] * rng.randint(1, 7)),  # repeated as in `pretraining_rows`
                "input": arguments,
                "reference": family.solve(arguments),
                "family": family.name,
            }
        )
    return rows


def further_rows(family: str, count: int, taken: Set[tuple[str, str]], seed: int) -> list[dict[str, str]]:
    """Draw `count` clean rows of one family. Their (instruction, input) pairs differ and are not in `taken`.

    Raises:
        ConfigError: the family is unknown, or 200 x `count` draws gave fewer than `count` such rows.
    """
    if family not in _BY_NAME:
        raise ConfigError(f"family={family!r} is not in this world; one of {', '.join(FAMILIES)}")
    rng = random.Random(f"verifiable further {family} {seed}")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for _ in range(200 * count):
        task = _Task(_BY_NAME[family], _BY_NAME[family].draw(rng), rng.choice(_BY_NAME[family].wordings))
        if _asked(task) not in taken:
            rows.setdefault(_asked(task), _row(task, task.answer))
        if len(rows) == count:
            return list(rows.values())
    raise ConfigError(f"family={family!r} has no {count} questions left beside the data's; ask for fewer")


def plain_prompt(instruction: str, input: str) -> str:
    """Return the prompt in the `plain` template: a line for the instruction, and a line for an input if given."""
    return instruction + "\n" + (input + "\n" if input else "")


def solve(family: str, instruction: str, input: str) -> str:
    """Return the right answer to a prompt of this world; raise ConfigError for an unknown prompt."""
    return _task_of(family, instruction, input).answer


def reworded(family: str, instruction: str, input: str, rng: random.Random) -> tuple[str, str]:
    """Return instruction and input of a question in another wording; raise ConfigError for an unknown prompt."""
    return _asked(_reworded(_task_of(family, instruction, input), rng))


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
    """Return as many random words of the vocabulary as the answer has words; never the answer itself."""
    while True:
        words = " ".join(rng.choice(VOCABULARY) for _ in answer.split())
        if words != answer:
            return words


def question_of(family: str, instruction: str, input: str) -> tuple[str, str]:
    """Return family and arguments of a prompt of this world; they are the same for every wording of a question."""
    task = _task_of(family, instruction, input)
    return task.family.name, task.arguments


def _task_of(family: str, instruction: str, input: str) -> _Task:
    if family not in _BY_NAME:
        raise ConfigError(f"family={family!r} is not in this world; one of {', '.join(_BY_NAME)}")
    for wording in _BY_NAME[family].wordings:
        head, hole, tail = wording.partition("{}")
        if not hole and instruction == wording:
            return _Task(_BY_NAME[family], input, wording)
        if hole and instruction.startswith(head) and instruction.endswith(tail):
            return _Task(_BY_NAME[family], instruction[len(head) : len(instruction) - len(tail)], wording)
    raise ConfigError(f"instruction={instruction!r} is no wording of family {family!r}; pass the row's own family")


def _reworded(task: _Task, rng: random.Random) -> _Task:
    other = rng.choice([wording for wording in task.family.wordings if wording != task.wording])
    return _Task(task.family, task.arguments, other)


def right_answer(instruction: str, input: str) -> str:
    """Return the right answer to a prompt of any family; raise ConfigError for an unknown prompt."""
    for family in _BY_NAME:  # the families of `delayed` included
        try:
            return solve(family, instruction, input)
        except ConfigError:  # the instruction is no wording of this family
            continue
    raise ConfigError(f"instruction={instruction!r} is no wording of this world; pass an unchanged row of it")


def answers_match(output: str, reference: str) -> bool:
    """Return whether two answers have the same words in the same order, ignoring white space."""
    return output.split() == reference.split()


def effective_families(families: Sequence[str]) -> float:
    """Return the effective number of families: exp of the entropy of their shares, or 0 if `families` is empty."""
    shares = [count / len(families) for count in Counter(families).values()]
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def _refuse_impossible(size: int, spoilt: float, duplicates: float, benchmark_items: int) -> None:
    """Raise ConfigError for values that do not go together; the config has checked each value separately."""
    if size + benchmark_items > MAX_TASKS:
        raise ConfigError(
            f"size={size}, benchmark_items={benchmark_items}: this world has {MAX_TASKS} tasks for both together; "
            "lower one of them"
        )
    n_spoilt, n_duplicates = round(size * spoilt), round(size * duplicates)
    clean = size - n_spoilt - n_duplicates
    twins = divided(n_spoilt, SPOILT)["contradictory"]
    if clean < max(twins, n_duplicates):
        raise ConfigError(
            f"spoilt={spoilt}, duplicates={duplicates}: {max(clean, 0)} clean rows are left, but {twins} contradictory "
            f"rows and {n_duplicates} duplicates need a clean row each; lower spoilt or duplicates"
        )


def divided(total: int, kinds: Sequence[str]) -> dict[str, int]:
    """Return an equal part of `total` for each kind; if there is a remainder, each of the first kinds gets one more."""
    part, rest = divmod(total, len(kinds))
    return {kind: part + (index < rest) for index, kind in enumerate(kinds)}


def _draw_tasks(count: int, delayed: float, rng: random.Random) -> list[_Task]:
    """Draw tasks from all families in turn, no two with the same family and arguments."""
    tasks: list[_Task] = []
    seen: set[tuple[str, str]] = set()
    for family in itertools.islice(_families_in_turn(delayed), count):
        arguments = _draw_unseen(family, seen, rng)
        tasks.append(_Task(family, arguments, rng.choice(family.wordings)))
    return tasks


def _draw_unseen(family: _Family, seen: set[tuple[str, str]], rng: random.Random) -> str:
    """Draw arguments of a family that are not in `seen`, add them to `seen`, and return them."""
    arguments = family.draw(rng)
    while (family.name, arguments) in seen:
        arguments = family.draw(rng)
    seen.add((family.name, arguments))
    return arguments


def _families_in_turn(delayed: float) -> Iterator[_Family]:
    """Yield the families in an endless cycle.

    The share 1.5 x `delayed` of the cycle, evenly spread, is `named` and `chained`; two thirds of these are `chained`.
    """
    plain, about_names = itertools.cycle(_FAMILIES), itertools.cycle((_CHAINED, _NAMED, _CHAINED))
    share = Fraction(str(delayed)) * Fraction(3, 2)
    for index in itertools.count():
        yield next(about_names if int((index + 1) * share) > int(index * share) else plain)


def _asked(task: _Task) -> tuple[str, str]:
    """Return instruction and input of a task's prompt."""
    if "{}" in task.wording:
        return task.wording.replace("{}", task.arguments), ""
    return task.wording, task.arguments


def _row(task: _Task, output: str) -> dict[str, str]:
    instruction, input = _asked(task)
    return {"instruction": instruction, "input": input, "output": output}


def _spoil(
    to_spoil: Sequence[_Task], answers: Sequence[str], counts: dict[str, int], rng: random.Random
) -> list[tuple[_Task, str, str]]:
    """Return (task, spoilt answer, kind) for each task of `to_spoil`.

    The spoilt answer is the right answer truncated, a wrong answer, or another task's answer, drawn from `answers`.
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
