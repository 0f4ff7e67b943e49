"""The demo's vocabulary: OpenMoji drawings that a stranger recognises at 64 pixels, in color and as bare outlines.

Chosen by eye from contact sheets: drawings whose meaning hangs on color alone, whose outline is clogged at this size,
or which carry text were left out.
"""

from __future__ import annotations

from dataclasses import dataclass

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray")


@dataclass(frozen=True)
class Subject:
    """One drawing and its words.

    Attributes:
        file: Stem of the SVG file in OpenMoji (its code points).
        name: Singular noun phrase, without an article.
        plural: Plural noun phrase.
        paint: Which fills a recoloring rewrites: "c" chromatic ones, "g" grays, "w" whites; "" means that it is never
            recolored, since the color would not show or carries the meaning.
        own: The color word of the drawing as it is, or None when no single word describes it.
        simple: Whether it is still clear at a third of the canvas (counts, pairs and small subjects use only these).
    """

    file: str
    name: str
    plural: str
    paint: str = "c"
    own: str | None = None
    simple: bool = True


SUBJECTS: tuple[Subject, ...] = (
    Subject("1F34E", "apple", "apples", paint="c", own="red", simple=True),
    Subject("1F34C", "banana", "bananas", paint="c", own="yellow", simple=True),
    Subject("1F352", "bunch of cherries", "bunches of cherries", paint="c", own="red", simple=True),
    Subject("1F353", "strawberry", "strawberries", paint="c", own="red", simple=True),
    Subject("1F347", "bunch of grapes", "bunches of grapes", paint="c", own="purple", simple=True),
    Subject("1F349", "slice of watermelon", "slices of watermelon", paint="c", own="red", simple=True),
    Subject("1F34B", "lemon", "lemons", paint="c", own="yellow", simple=True),
    Subject("1F350", "pear", "pears", paint="c", own="green", simple=True),
    Subject("1F34D", "pineapple", "pineapples", paint="c", own="brown", simple=False),
    Subject("1F955", "carrot", "carrots", paint="c", own="orange", simple=True),
    Subject("1F346", "eggplant", "eggplants", paint="c", own="purple", simple=True),
    Subject("1F951", "avocado", "avocados", paint="c", own="green", simple=True),
    Subject("1F345", "tomato", "tomatoes", paint="c", own="red", simple=True),
    Subject("1F344", "mushroom", "mushrooms", paint="c", own="red", simple=True),
    Subject("1F335", "cactus", "cacti", paint="c", own="green", simple=True),
    Subject("1F337", "tulip", "tulips", paint="c", own="orange", simple=True),
    Subject("1F339", "rose", "roses", paint="c", own="red", simple=False),
    Subject("1F332", "pine tree", "pine trees", paint="c", own="green", simple=True),
    Subject("1F334", "palm tree", "palm trees", paint="c", own="green", simple=True),
    Subject("1F340", "clover", "clovers", paint="c", own="green", simple=True),
    Subject("1F9C0", "piece of cheese", "pieces of cheese", paint="c", own="yellow", simple=True),
    Subject("1F354", "burger", "burgers", paint="c", own=None, simple=False),
    Subject("1F355", "slice of pizza", "slices of pizza", paint="c", own="yellow", simple=True),
    Subject("1F369", "donut", "donuts", paint="c", own="yellow", simple=True),
    Subject("1F36A", "cookie", "cookies", paint="c", own="brown", simple=True),
    Subject("1F382", "cake", "cakes", paint="c", own="yellow", simple=True),
    Subject("1F9C1", "cupcake", "cupcakes", paint="c", own=None, simple=False),
    Subject("1F366", "ice cream", "ice creams", paint="", own="yellow", simple=False),
    Subject("1F950", "croissant", "croissants", paint="c", own="orange", simple=True),
    Subject("1F968", "pretzel", "pretzels", paint="c", own="orange", simple=True),
    Subject("1F964", "cup", "cups", paint="", own="red", simple=True),
    Subject("1F408", "cat", "cats", paint="c", own="orange", simple=True),
    Subject("1F415", "dog", "dogs", paint="c", own="orange", simple=True),
    Subject("1F41F", "fish", "fish", paint="c", own="blue", simple=True),
    Subject("1F433", "whale", "whales", paint="c", own="blue", simple=True),
    Subject("1F42C", "dolphin", "dolphins", paint="g", own="gray", simple=True),
    Subject("1F419", "octopus", "octopuses", paint="c", own="red", simple=True),
    Subject("1F980", "crab", "crabs", paint="c", own="red", simple=True),
    Subject("1F422", "turtle", "turtles", paint="c", own="green", simple=False),
    Subject("1F40D", "snake", "snakes", paint="c", own="green", simple=True),
    Subject("1F438", "frog", "frogs", paint="c", own="green", simple=True),
    Subject("1F424", "chick", "chicks", paint="c", own="yellow", simple=True),
    Subject("1F426", "bird", "birds", paint="c", own="brown", simple=True),
    Subject("1F986", "duck", "ducks", paint="c", own="brown", simple=True),
    Subject("1F416", "pig", "pigs", paint="c", own="pink", simple=True),
    Subject("1F40E", "horse", "horses", paint="c", own="brown", simple=True),
    Subject("1F418", "elephant", "elephants", paint="g", own="gray", simple=True),
    Subject("1F992", "giraffe", "giraffes", paint="c", own="orange", simple=True),
    Subject("1F43B", "bear", "bears", paint="c", own="brown", simple=True),
    Subject("1F98A", "fox", "foxes", paint="c", own="orange", simple=True),
    Subject("1F981", "lion", "lions", paint="c", own="orange", simple=True),
    Subject("1F42D", "mouse", "mice", paint="cg", own="gray", simple=True),
    Subject("1F98B", "butterfly", "butterflies", paint="c", own="blue", simple=True),
    Subject("1F41E", "ladybug", "ladybugs", paint="c", own="red", simple=True),
    Subject("1F996", "dinosaur", "dinosaurs", paint="c", own="green", simple=False),
    Subject("1F409", "dragon", "dragons", paint="c", own="green", simple=False),
    Subject("1FABC", "jellyfish", "jellyfish", paint="c", own="purple", simple=True),
    Subject("1F9A9", "flamingo", "flamingos", paint="c", own="pink", simple=True),
    Subject("1F40A", "crocodile", "crocodiles", paint="c", own="green", simple=False),
    Subject("1F42A", "camel", "camels", paint="c", own="orange", simple=True),
    Subject("1F697", "car", "cars", paint="c", own="red", simple=True),
    Subject("1F68C", "bus", "buses", paint="c", own="red", simple=False),
    Subject("1F69C", "tractor", "tractors", paint="c", own="green", simple=False),
    Subject("2708", "airplane", "airplanes", paint="g", own="gray", simple=True),
    Subject("1F681", "helicopter", "helicopters", paint="c", own="red", simple=False),
    Subject("1F680", "rocket", "rockets", paint="c", own="red", simple=True),
    Subject("1F6F8", "flying saucer", "flying saucers", paint="c", own=None, simple=True),
    Subject("1F3E0", "house", "houses", paint="c", own="red", simple=True),
    Subject("26FA", "tent", "tents", paint="c", own="yellow", simple=True),
    Subject("1F3F0", "castle", "castles", paint="cg", own="gray", simple=False),
    Subject("1F4A1", "light bulb", "light bulbs", paint="c", own="yellow", simple=True),
    Subject("1F511", "key", "keys", paint="c", own="orange", simple=True),
    Subject("1F512", "padlock", "padlocks", paint="c", own="yellow", simple=True),
    Subject("1F514", "bell", "bells", paint="c", own="yellow", simple=True),
    Subject("231B", "hourglass", "hourglasses", paint="", own="gray", simple=True),
    Subject("260E", "telephone", "telephones", paint="c", own="red", simple=True),
    Subject("1F3B8", "guitar", "guitars", paint="c", own="red", simple=False),
    Subject("1F941", "drum", "drums", paint="c", own="red", simple=True),
    Subject("1F388", "balloon", "balloons", paint="c", own="red", simple=True),
    Subject("1F381", "gift", "gifts", paint="c", own="yellow", simple=True),
    Subject("1F451", "crown", "crowns", paint="c", own="yellow", simple=True),
    Subject("1F452", "hat", "hats", paint="c", own="yellow", simple=True),
    Subject("1F455", "shirt", "shirts", paint="c", own="blue", simple=True),
    Subject("1F457", "dress", "dresses", paint="c", own="blue", simple=True),
    Subject("1F45F", "sneaker", "sneakers", paint="g", own="gray", simple=True),
    Subject("1F462", "boot", "boots", paint="c", own="brown", simple=True),
    Subject("1F45C", "handbag", "handbags", paint="c", own="brown", simple=True),
    Subject("1F392", "backpack", "backpacks", paint="c", own="red", simple=True),
    Subject("2602", "umbrella", "umbrellas", paint="c", own="purple", simple=True),
    Subject("2764", "heart", "hearts", paint="c", own="red", simple=True),
    Subject("2B50", "star", "stars", paint="c", own="yellow", simple=True),
    Subject("1F319", "moon", "moons", paint="c", own="yellow", simple=True),
    Subject("2600", "sun", "suns", paint="c", own="yellow", simple=False),
    Subject("2601", "cloud", "clouds", paint="g", own="gray", simple=True),
    Subject("26A1", "lightning bolt", "lightning bolts", paint="c", own="yellow", simple=True),
    Subject("1F308", "rainbow", "rainbows", paint="", own=None, simple=False),
    Subject("1F525", "flame", "flames", paint="c", own="yellow", simple=True),
    Subject("1F4A7", "water drop", "water drops", paint="c", own="blue", simple=True),
    Subject("1F47B", "ghost", "ghosts", paint="gw", own="gray", simple=True),
    Subject("1F916", "robot", "robots", paint="g", own="gray", simple=True),
    Subject("1F47D", "alien", "aliens", paint="g", own="gray", simple=True),
    Subject("1F383", "pumpkin", "pumpkins", paint="c", own="orange", simple=True),
    Subject("1F3C6", "trophy", "trophies", paint="c", own="yellow", simple=True),
    Subject("1F3C0", "basketball", "basketballs", paint="c", own="orange", simple=True),
    Subject("1F3B2", "dice", "dice", paint="g", own="gray", simple=True),
    Subject("1F9F8", "teddy bear", "teddy bears", paint="c", own="brown", simple=False),
    Subject("1FA81", "kite", "kites", paint="c", own="pink", simple=True),
    Subject("270F", "pencil", "pencils", paint="c", own=None, simple=True),
    Subject("2709", "envelope", "envelopes", paint="g", own="gray", simple=True),
    Subject("1F6AA", "door", "doors", paint="c", own="brown", simple=True),
    Subject("1FA91", "chair", "chairs", paint="c", own="yellow", simple=True),
    Subject("1F56F", "candle", "candles", paint="", own=None, simple=True),
    Subject("2699", "gear", "gears", paint="g", own="gray", simple=True),
    Subject("1FAA3", "bucket", "buckets", paint="c", own="blue", simple=True),
    Subject("1F3FA", "vase", "vases", paint="c", own="orange", simple=True),
    Subject("1FAD6", "teapot", "teapots", paint="g", own="gray", simple=True),
    Subject("1F48E", "diamond", "diamonds", paint="c", own="blue", simple=True),
    Subject("1FA90", "planet", "planets", paint="c", own="red", simple=True),
    Subject("1F600", "smiley face", "smiley faces", paint="c", own="yellow", simple=True),
    Subject("1F441", "eye", "eyes", paint="", own="brown", simple=True),
    Subject("1F444", "mouth", "mouths", paint="c", own="red", simple=True),
    Subject("270B", "hand", "hands", paint="c", own="yellow", simple=True),
    Subject("1FAB6", "feather", "feathers", paint="c", own="purple", simple=True),
    Subject("1F380", "bow", "bows", paint="c", own="red", simple=True),
    Subject("1F6E1", "shield", "shields", paint="c", own="red", simple=True),
)

BY_NAME = {subject.name: subject for subject in SUBJECTS}
