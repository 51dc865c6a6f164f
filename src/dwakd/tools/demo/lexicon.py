"""The words and facts from which the demo's corpus is made."""


def _words(text: str) -> list[str]:
    """Split 'a b_c' into [a, b c]; an underscore stands for a space."""
    return [word.replace("_", " ") for word in text.split()]


def _rows(text: str) -> list[tuple[str, ...]]:
    """Split 'a-b-c d-e-f' into [(a, b, c), (d, e, f)]."""
    return [tuple(entry.split("-")) for entry in _words(text)]


def _pairs(text: str) -> dict[str, str]:
    """Turn 'a-b c-d' into {a: b, c: d}."""
    return {row[0]: row[1] for row in _rows(text)}


WOMEN = _words("Zoë Anna Clara Dora Ella Frida Greta Hanna Ida Julia Lena Maria Nora Olga Paula Rosa Sara Tina Vera")
MEN = _words("Adam Ben David Emil Felix Georg Hugo Ivan Jakob Leo Max Noah Otto Peter René Simon Tom Victor Walter")
TOWNS = _pairs(
    "Oslo-Norway Paris-France Rome-Italy Berlin-Germany Madrid-Spain Vienna-Austria Athens-Greece Dublin-Ireland "
    "Lisbon-Portugal Warsaw-Poland Prague-Czechia Cairo-Egypt Tokyo-Japan Delhi-India Lima-Peru Ankara-Turkey "
    "Nairobi-Kenya Ottawa-Canada Bogotá-Colombia Hanoi-Vietnam Zürich-Switzerland Malmö-Sweden"
)
JOBS = _pairs(
    "baker-bakes_bread painter-paints_walls teacher-teaches_children tailor-sews_clothes farmer-grows_crops "
    "doctor-treats_patients cook-prepares_meals author-writes_books miner-digs_for_coal pilot-flies_planes "
    "sailor-steers_ships judge-decides_cases gardener-plants_trees barber-cuts_hair actor-plays_roles "
    "dentist-repairs_teeth builder-builds_houses florist-sells_flowers potter-shapes_clay librarian-lends_books"
)
KINDS = {
    "fruit": _words("apple plum pear cherry lemon peach melon grape"),
    "tool": _words("hammer saw drill spade rake chisel wrench axe"),
    "vehicle": _words("bus train bicycle tractor truck ferry tram van"),
    "instrument": _words("drum flute violin harp trumpet piano guitar organ"),
    "garment": _words("coat shirt scarf glove hat skirt jacket sock"),
    "bird": _words("eagle swan robin crow parrot stork pigeon owl"),
}
THINGS = _words(
    "basket candle mirror pillow kettle ladder lantern blanket bucket carpet bottle camera clock drawer map table"
)
WORDS = _words("arm bell cake door egg fire gate hill ice jar king leaf moon nest oil pen queen road sun tent")
COLOURS = _words("red blue green yellow black white brown grey pink orange")
OPPOSITES = _pairs(
    "big-small old-new clean-dirty heavy-light cheap-expensive dry-wet full-empty hard-soft open-closed long-short "
    "warm-cold thick-thin wide-narrow rough-smooth common-rare safe-dangerous"
)
MOODS = _pairs(
    "happy-sad rich-poor brave-afraid kind-cruel awake-asleep busy-idle healthy-ill early-late polite-rude "
    "calm-nervous lucky-unlucky right-wrong present-absent proud-ashamed"
)
# present, past, participle, object
VERBS = _rows(
    "writes-wrote-written-a_letter sings-sang-sung-a_song eats-ate-eaten-an_apple breaks-broke-broken-a_cup "
    "draws-drew-drawn-a_tree reads-read-read-a_book finds-found-found-a_coin buys-bought-bought-a_lamp "
    "drinks-drank-drunk-a_coffee drives-drove-driven-a_car hides-hid-hidden-a_key makes-made-made-a_cake "
    "sells-sold-sold-a_horse steals-stole-stolen-a_pie throws-threw-thrown-a_ball wears-wore-worn-a_crown "
    "cuts-cut-cut-a_rope loses-lost-lost-a_ring holds-held-held-a_flag takes-took-taken-a_photo"
)
PLACES = _words("garden kitchen park school market forest library station valley tower harbour museum")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
# animal, plural, young
ANIMALS = _rows(
    "cow-cows-calf dog-dogs-puppy cat-cats-kitten sheep-sheep-lamb goat-goats-kid horse-horses-foal "
    "lion-lions-cub frog-frogs-tadpole goose-geese-gosling pig-pigs-piglet deer-deer-fawn fox-foxes-kit "
    "duck-ducks-duckling hen-hens-chick hare-hares-leveret seal-seals-pup wolf-wolves-whelp swan-swans-cygnet"
)
# span, the smaller unit, the span in that unit
SPANS = _rows(
    "a_week-days-seven_days a_fortnight-days-fourteen_days three_weeks-days-twenty_one_days "
    "a_year-months-twelve_months half_a_year-months-six_months two_years-months-twenty_four_months "
    "a_decade-years-ten_years two_decades-years-twenty_years a_day-hours-twenty_four_hours "
    "half_a_day-hours-twelve_hours an_hour-minutes-sixty_minutes half_an_hour-minutes-thirty_minutes"
)
NUMBERS = _words("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS = _words("first second third")
