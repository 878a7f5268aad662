"""Parallel sentences of a grammar: English to German word order, gender, case, and numbers said the other way round.

``the three old dogs have seen a small house near the river`` becomes ``die drei alten hunde haben ein kleines haus bei
dem fluss gesehen``. What a translation needs is what makes real ones hard for a small model: words that agree over a
distance, and words that move.
"""

from __future__ import annotations

import random
from collections.abc import Iterator


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in text.split(";"))


# English singular and plural, German singular, plural and gender.
NOUNS = _table("""
    dog dogs hund hunde m; cat cats katze katzen f; child children kind kinder n;
    teacher teachers lehrer lehrer m; friend friends freund freunde m; doctor doctors arzt ärzte m;
    woman women frau frauen f; girl girls mädchen mädchen n; house houses haus häuser n; car cars auto autos n;
    tree trees baum bäume m; flower flowers blume blumen f; book books buch bücher n;
    letter letters brief briefe m; picture pictures bild bilder n; lamp lamps lampe lampen f;
    bridge bridges brücke brücken f; ship ships schiff schiffe n; garden gardens garten gärten m;
    church churches kirche kirchen f
""")
PEOPLE, PLACES = NOUNS[:8], NOUNS[8:]
ADJECTIVES = _table("""
    old alt; small klein; big groß; new neu; red rot; green grün; quiet still; strange seltsam; famous berühmt;
    cheap billig; young jung; beautiful schön
""")
# English third person, plural, participle; German singular, plural, participle.
VERBS = _table("""
    sees see seen sieht sehen gesehen; finds find found findet finden gefunden;
    buys buy bought kauft kaufen gekauft; paints paint painted malt malen gemalt;
    sells sell sold verkauft verkaufen verkauft; loves love loved liebt lieben geliebt;
    seeks seek sought sucht suchen gesucht; shows show shown zeigt zeigen gezeigt;
    forgets forget forgotten vergisst vergessen vergessen;
    describes describe described beschreibt beschreiben beschrieben
""")
PREPOSITIONS = _table("near bei; behind hinter; with mit; under unter")
TIMES = (("today", "heute"), ("yesterday", "gestern"), ("often", "oft"), ("in winter", "im winter"))
UNITS = (
    ("", ""),
    *_table("one ein; two zwei; three drei; four vier; five fünf; six sechs; seven sieben; eight acht; nine neun"),
)
TENS = _table("""
    twenty zwanzig; thirty dreißig; forty vierzig; fifty fünfzig; sixty sechzig; seventy siebzig; eighty achtzig;
    ninety neunzig
""")
ARTICLES = {  # by definiteness and case: gender to article; plural "p"
    ("the", "nominative"): {"m": "der", "f": "die", "n": "das", "p": "die"},
    ("the", "accusative"): {"m": "den", "f": "die", "n": "das", "p": "die"},
    ("the", "dative"): {"m": "dem", "f": "der", "n": "dem", "p": "den"},
    ("a", "nominative"): {"m": "ein", "f": "eine", "n": "ein"},
    ("a", "accusative"): {"m": "einen", "f": "eine", "n": "ein"},
    ("a", "dative"): {"m": "einem", "f": "einer", "n": "einem"},
}
ENDINGS = {  # of adjectives: after "der" mostly -e or -en, after "ein" as the article would have been
    ("the", "nominative"): {"m": "e", "f": "e", "n": "e", "p": "en"},
    ("the", "accusative"): {"m": "en", "f": "e", "n": "e", "p": "en"},
    ("the", "dative"): {"m": "en", "f": "en", "n": "en", "p": "en"},
    ("a", "nominative"): {"m": "er", "f": "e", "n": "es"},
    ("a", "accusative"): {"m": "en", "f": "e", "n": "es"},
    ("a", "dative"): {"m": "en", "f": "en", "n": "en"},
}
Pair = tuple[list[str], list[str]]


def number(rng: random.Random) -> Pair:
    """Return a number from 2 to 99: tens first in English, units first in German."""
    unit = UNITS[rng.randrange(1, 10)]
    if rng.random() < 0.5:
        unit = UNITS[rng.randrange(2, 10)]
        return [unit[0]], [unit[1]]
    ten = rng.choice(TENS)
    return [ten[0], unit[0]], [unit[1], "und", ten[1]]


def noun_phrase(rng: random.Random, nouns: tuple, case: str) -> tuple[list[str], list[str], bool]:
    """English words, German words, whether it is plural."""
    one, many, ein, viele, gender = rng.choice(nouns)
    plural = rng.random() < 0.4
    article = "the" if plural else rng.choice(("the", "a"))
    key = "p" if plural else gender
    english, german = [article], [ARTICLES[article, case][key]]
    if plural and rng.random() < 0.6:
        words = number(rng)
        english, german = english + words[0], german + words[1]
    for adjective in rng.sample(ADJECTIVES, rng.choice((0, 1, 1, 2))):
        english.append(adjective[0])
        german.append(adjective[1] + ENDINGS[article, case][key])
    dative_n = "n" if case == "dative" and plural and not viele.endswith(("n", "s")) else ""
    return [*english, many if plural else one], [*german, viele + dative_n if plural else ein], plural


def sentence(rng: random.Random) -> Pair:
    """One sentence: subject, verb, object, perhaps a place, a time, the perfect tense, a clause around it."""
    subject, subjekt, plural = noun_phrase(rng, PEOPLE, "nominative")
    thing, objekt, _ = noun_phrase(rng, NOUNS, "accusative")
    verb = rng.choice(VERBS)
    english_verb, german_verb, participle = [verb[plural]], verb[3 + plural], ""
    if rng.random() < 0.4:
        english_verb = ["have" if plural else "has", verb[2]]
        german_verb, participle = "haben" if plural else "hat", verb[5]
    english, middle = [*subject, *english_verb, *thing], [*objekt]
    if rng.random() < 0.5:
        preposition = rng.choice(PREPOSITIONS)
        place, platz, _ = noun_phrase(rng, PLACES, "dative")
        english, middle = [*english, preposition[0], *place], [*middle, preposition[1], *platz]
    time = rng.choice(TIMES) if rng.random() < 0.4 else None
    end = [participle] if participle else []
    if rng.random() < 0.3:  # a clause: the verb goes to its end
        english, german = ["i", "know", "that", *english], ["ich", "weiß", ",", "dass", *subjekt, *middle]
        if time:
            english, german = english + time[0].split(), [*german[:4], *subjekt, *time[1].split(), *middle]
        return english, [*german, *end, german_verb]
    if time:  # the time comes first, and the subject after the verb
        return [*time[0].split(), *english], [*time[1].split(), german_verb, *subjekt, *middle, *end]
    return english, [*subjekt, german_verb, *middle, *end]


def sentences(seed: int) -> Iterator[Pair]:
    """Different pairs of English and German words, without end."""
    rng, seen = random.Random(seed), set()
    while True:
        english, german = sentence(rng)
        if " ".join(english) not in seen:
            seen.add(" ".join(english))
            yield english, german
