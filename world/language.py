"""Write text about a scene: captions, notes, questions with answers by family, and dialogues.

Every sentence follows from the scene, so every answer is true. The random generator only chooses the question and its
wording.

An answer repeats the question's noun before it states a fact, and an answer that needs two facts states both before
its conclusion: "The star is red and the cross is blue, so no." Small models learn this sooner than bare answers ("red",
"no"), because the noun stands next to the fact.
"""

import random
from itertools import permutations, product
from operator import attrgetter

from world.scenes import COLORS, SHAPES, Scene, SceneObject

CELL_NAMES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CELL_PHRASES = ("in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right")
CELL_PHRASES += ("in the bottom left", "at the bottom", "in the bottom right")

DESCRIBE = "Describe the image."  # also the default prompt of sample.py


def describe_object(obj: SceneObject) -> str:
    return f"sign that says {obj.text}" if obj.text else f"{obj.size} {obj.color} {obj.shape}"


def join_list(parts: list[str]) -> str:
    """Join parts as English does: "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe_scene(scene: Scene) -> str:
    """Return one sentence that names every object and its cell, in reading order."""
    objects = sorted(scene.objects, key=lambda obj: obj.cell)
    return join_list([f"a {describe_object(obj)} {CELL_PHRASES[obj.cell]}" for obj in objects]) + "."


def write_caption(scene: Scene, rng: random.Random) -> str:
    """Return a sentence that names every object and its cell, in one of several forms and in random order.

    In reading order, the order alone would tell where an object is, and the projector would not learn positions.
    """
    objects = rng.sample(scene.objects, len(scene.objects))
    if rng.random() < 0.25:
        parts = [f"{CELL_PHRASES[obj.cell]} there is a {describe_object(obj)}" for obj in objects]
    else:
        parts = [f"a {describe_object(obj)} {CELL_PHRASES[obj.cell]}" for obj in objects]
    opening = rng.choice(("", "", "an image of ", "we see ", "this is "))
    return opening + join_list(parts) + "."


def write_notes(scene: Scene, rng: random.Random) -> str:
    """Return the scene as notes in random order. They replace the image while stage 0 trains the decoder on text."""
    lines = [f" {describe_object(obj)} {CELL_NAMES[obj.cell]} ." for obj in scene.objects]
    rng.shuffle(lines)
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# questions, by family
#
# Each function returns a question and its answer, or None if the scene leaves nothing to ask.


def find_unique(scene: Scene, *attributes: str) -> list[SceneObject]:
    """Return the shapes whose attributes no other shape has: with "shape", those that "the star" names uniquely."""
    values = [attrgetter(*attributes)(obj) for obj in scene.shapes]
    return [obj for obj, value in zip(scene.shapes, values) if values.count(value) == 1]


def nameable_objects(scene: Scene) -> list[SceneObject]:
    """Return the objects that one word names: the shapes that occur once, and the sign."""
    return find_unique(scene, "shape") + ([scene.sign] if scene.sign else [])


def yes_no(flag: bool) -> str:
    return "yes" if flag else "no"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase.startswith('orange') else 'a'} {phrase}"


def ask_existence(scene: Scene, rng: random.Random):
    """Ask if there is an object of a color, a shape, or both. About half of the answers are no."""
    kind = rng.choice(("color", "shape", "pair", "pair"))
    if kind == "pair":
        truth, color, shape = choose_pair(scene, rng)
        question, reason = f"{color} {shape}", list_colors(scene, shape)
    else:
        present = {getattr(obj, kind) for obj in scene.shapes}
        absent = [value for value in (COLORS if kind == "color" else SHAPES) if value not in present]
        truth = rng.random() < 0.5 or not absent
        value = rng.choice(sorted(present) if truth else absent)
        question = f"{value} shape" if kind == "color" else value
        reason = list_shapes(scene, value) if kind == "color" else list_colors(scene, value)
    form = rng.choice(("Is there {}?", "Is there {} in the image?", "Do you see {}?"))
    return form.format(with_article(question)), f"{reason}, so {yes_no(truth)}."


def list_colors(scene: Scene, shape: str) -> str:
    """Return a clause on the colors of all objects of a shape, in reading order."""
    colors = [obj.color for obj in sorted(scene.shapes, key=attrgetter("cell")) if obj.shape == shape]
    if not colors:
        return f"There is no {shape}"
    return f"The {plural(shape)} are {join_list(colors)}" if len(colors) > 1 else f"The {shape} is {colors[0]}"


def list_shapes(scene: Scene, color: str) -> str:
    """Return a clause on the shapes of all objects of a color, in reading order."""
    shapes = [f"a {obj.shape}" for obj in sorted(scene.shapes, key=attrgetter("cell")) if obj.color == color]
    if not shapes:
        return f"There is no {color} shape"
    return f"The {color} {'ones are' if len(shapes) > 1 else 'one is'} {join_list(shapes)}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def choose_pair(scene: Scene, rng: random.Random) -> tuple[bool, str, str]:
    """Return (truth, color, shape) of a random pair. truth: if an object has both; True for half of the pairs."""
    pairs = scene.color_shape_pairs
    if rng.random() < 0.5:
        return True, *rng.choice(sorted(pairs))
    # If the scene allows it, half are near misses: it has the color and the shape, in different objects.
    colors, shapes = ({pair[i] for pair in pairs} for i in (0, 1))
    known = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in pairs]
    chosen = [(color, shape) for color, shape in absent if (color in colors, shape in shapes) == known]
    return False, *rng.choice(chosen or absent)


def ask_color(scene: Scene, rng: random.Random):
    if not (objects := find_unique(scene, "shape")):
        return None
    obj = rng.choice(objects)
    question = rng.choice(("What color is the {}?", "Which color does the {} have?")).format(obj.shape)
    return question, f"The {obj.shape} is {obj.color}."


def ask_shape(scene: Scene, rng: random.Random):
    """Ask for the shape in a cell, or for the shape of a color that occurs once."""
    if rng.random() < 0.5:
        obj = rng.choice(scene.shapes)
        where = CELL_PHRASES[obj.cell]
        return f"What shape is {where}?", f"{where.capitalize()} is a {obj.shape}."
    if not (objects := find_unique(scene, "color")):
        return None
    obj = rng.choice(objects)
    question = rng.choice(("What shape is the {} one?", "Which shape is {}?")).format(obj.color)
    return question, f"The {obj.color} one is a {obj.shape}."


def ask_counting(scene: Scene, rng: random.Random):
    """Ask how many shapes there are, in all, of a color, or of a kind. One color or kind in five is absent."""
    kind = rng.choice(("all", "color", "shape"))
    if kind == "all":
        return "How many shapes are there?", str(len(scene.shapes))
    values = [getattr(obj, kind) for obj in scene.shapes]
    absent = [value for value in (COLORS if kind == "color" else SHAPES) if value not in values]
    repeated = [value for value in values if values.count(value) > 1]
    value = rng.choice(absent if absent and rng.random() < 0.2 else repeated or values)
    counted = f"{value} shapes" if kind == "color" else plural(value)
    return f"How many {counted} are there?", str(values.count(value))


def ask_position(scene: Scene, rng: random.Random):
    """Ask where an object is that a shape, or a color and a shape, names uniquely."""
    options = [(f"{obj.color} {obj.shape}", obj) for obj in find_unique(scene, "color", "shape")]
    if rng.random() < 0.5 or not options:
        options = [(obj.shape, obj) for obj in nameable_objects(scene)]
    if not options:
        return None
    name, obj = rng.choice(options)
    question = rng.choice(("Where is the {}?", "In which place is the {}?")).format(name)
    return question, state_position(name, obj) + "."


def state_position(name: str, obj: SceneObject) -> str:
    return f"The {name} is {CELL_PHRASES[obj.cell]}"


def ask_relation(scene: Scene, rng: random.Random):
    """Ask where one object is, seen from another, or if it is on a given side. Half of the latter answers are yes."""
    objects = nameable_objects(scene)
    if len(objects) < 2:
        return None
    first, second = rng.sample(objects, 2)
    directions = find_directions(first, second)
    reason = f"{state_position(first.shape, first)} and {state_position(second.shape, second).lower()}, so"
    if rng.random() < 0.5:
        question = f"Where is the {first.shape}, seen from the {second.shape}?"
        return question, f"{reason} {' and '.join(directions)}."
    truth, claimed = rng.random() < 0.5, rng.choice(directions)
    if not truth:
        claimed = OPPOSITES[claimed]
    return f"Is the {first.shape} {RELATIONS[claimed]} the {second.shape}?", f"{reason} {yes_no(truth)}."


RELATIONS = {"to the left": "to the left of", "to the right": "to the right of", "above": "above", "below": "below"}
OPPOSITES = {"to the left": "to the right", "to the right": "to the left", "above": "below", "below": "above"}


def find_directions(first: SceneObject, second: SceneObject) -> list[str]:
    """Return where `first` is, seen from `second`: two directions if they share neither row nor column, else one."""
    (row, column), (other_row, other_column) = divmod(first.cell, 3), divmod(second.cell, 3)
    directions = [] if row == other_row else ["above" if row < other_row else "below"]
    if column != other_column:
        directions.append("to the left" if column < other_column else "to the right")
    return directions


def ask_reading(scene: Scene, rng: random.Random):
    if not scene.sign:
        return None
    question = rng.choice(("What does the sign say?", "What is written on the sign?"))
    return question, f"The sign says {scene.sign.text}."


def ask_comparison(scene: Scene, rng: random.Random):
    """Ask which of two shapes is larger, or if they have the same color. Half of the latter answers are yes."""
    pairs = list(permutations(find_unique(scene, "shape"), 2))
    if not pairs:
        return None
    alike = [pair for pair in pairs if pair[0].color == pair[1].color]
    if rng.random() < 0.29:
        a, b = rng.choice(alike or pairs)
        reason = f"The {a.shape} is {a.color} and the {b.shape} is {b.color}, so"
        return f"Do the {a.shape} and the {b.shape} have the same color?", f"{reason} {yes_no(bool(alike))}."
    unequal = [pair for pair in pairs if pair[0].size != pair[1].size]
    if not unequal:
        return None
    a, b = rng.choice(unequal)
    word, size = rng.choice((("larger", "large"), ("smaller", "small")))
    reason = f"The {a.shape} is {a.size} and the {b.shape} is {b.size}, so"
    return f"Which is {word}, the {a.shape} or the {b.shape}?", f"{reason} the {(a if a.size == size else b).shape}."


def ask_reasoning(scene: Scene, rng: random.Random):
    """Ask for the color or shape of the one shape that is in a given relation to another object."""
    options = []
    for anchor in nameable_objects(scene):
        others = [obj for obj in scene.shapes if obj is not anchor]
        for direction, relation in RELATIONS.items():
            candidates = [obj for obj in others if direction in find_directions(obj, anchor)]
            if len(candidates) == 1:
                (obj,) = candidates
                options.append((f"What color is the shape {relation} the {anchor.shape}?", obj.color))
                options.append((f"Which shape is {relation} the {anchor.shape}?", obj.shape))
        same = [obj for obj in others if obj.color == anchor.color]
        if len(same) == 1:
            options.append((f"Which other shape has the color of the {anchor.shape}?", same[0].shape))
    return rng.choice(options) if options else None


def ask_description(scene: Scene, rng: random.Random):
    question = rng.choice((DESCRIBE, "Describe the image in detail.", "What do you see?"))
    return question, describe_scene(scene)


FAMILIES = {  # groups of questions that ask for the same ability
    "existence": ask_existence,
    "color": ask_color,
    "shape": ask_shape,
    "counting": ask_counting,
    "position": ask_position,
    "relation": ask_relation,
    "reading": ask_reading,
    "comparison": ask_comparison,
    "reasoning": ask_reasoning,
    "description": ask_description,
}


# ---------------------------------------------------------------------------------------------------------------------
# dialogues

# Each training scene gets one question of each of these, if it allows one. The families learned last come twice.
DIALOGUE_FAMILIES = ("existence", "comparison", "relation", "position") * 2
DIALOGUE_FAMILIES += ("color", "shape", "counting", "reading", "reasoning")

# Long dialogues teach less: at first an answer attends evenly to everything before it, and many other questions
# outweigh the image.
TURNS = 2


def make_dialogues(scene: Scene, rng: random.Random, turns: int) -> list[list[tuple[str, str]]]:
    """Return dialogues of about `turns` questions with answers, about one scene, without a repeated question.

    A question about a shape's position may be followed by one about "it". Half of the scenes also get a dialogue with
    only a description, which would give the other answers away.
    """
    dialogues, asked = [[]], set()
    for family in rng.sample(DIALOGUE_FAMILIES, len(DIALOGUE_FAMILIES)):
        pair = FAMILIES[family](scene, rng)
        if pair is None or pair[0] in asked:
            continue
        asked.add(pair[0])
        if len(dialogues[-1]) >= turns:
            dialogues.append([])
        dialogues[-1].append(pair)
        subject = next((obj for obj in find_unique(scene, "shape") if pair[0].endswith(f"the {obj.shape}?")), None)
        if family == "position" and subject and rng.random() < 0.3:
            dialogues[-1].append(("What color is it?", f"The {subject.shape} is {subject.color}."))
    return dialogues + ([[ask_description(scene, rng)]] if rng.random() < 0.5 else [])
