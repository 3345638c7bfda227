"""Recognise drawings by their paths in Debian's ``openclipart-png``: which show a class,
which are clutter, which are no pictures, and the words in their names.
"""

from __future__ import annotations

import re

# fmt: off
NOT_PICTURES = re.compile(
    r"shapes/|computer/(icons|buttons)|buttons/|recreation/games/cards|signs_and_symbols/("
    r"flags|led|map_symbols)|aiga-symbols|roadsigns|special/|boating_rules|sailing_|knot_|"
    r"unsorted/duplicates"
)
CLUTTER = re.compile(
    r"(tools|office|computer|electronics|education|science|containers|signs_and_symbols|"
    r"recreation/(music|sports|games)|geography|decorations|logos)"
)
CLASS_FILES = {
    "bird": (
        r"animals/birds/(?!contour_bat|simbolo|wing_|turkey_on|stormo|mirjam|manager)|animals/("
        r"emperor_penguin|new_penguin|pinguino|baby-tux|ralf_ark)|unsorted/(Anatra|Colombo|"
        r"colombo2|Pinguino|gabbiano|papera|pennuto|struzzo|marchio_gallina)"
    ),
    "bug": (
        r"animals/bugs/(?!virus|lumaca|quattro|mostric)|animals/(mosquito|scorpion|punaisa)|"
        r"unsorted/(ape_miele|caterpillar)"
    ),
    "cat": (
        r"animals/mammals/(housecats/|big_cats/|cartoon_cat)|unsorted/set_gatti"
    ),
    "car": (
        r"transportation/(vehicles/)?(hummers/|hummer|1989_chev|_chevrolet|4wd|blazer|old_car|"
        r"redcar|skoda|sportcar|shelby_cobra_car|toyota|dodge|car_jamin|car\.png|bmw|formula|"
        r"autos|ambulans|bus[12_]|bus\.png|big_truck|small_truck|old_truck|truck_|fire_engine)|"
        r"unsorted/ambulanza"
    ),
    "house": (
        r"buildings/homes/|buildings/(house|perspectival_house|church|school_country|"
        r"firestation|carnegie)|unsorted/(Condominio|fattoria|igloo)"
    ),
    "flower": (
        r"plants/(flowers/)?(?!cactus|cartoon_tree|flower-pot)(bouquet|daffodil|daisy|"
        r"dream_flower|fiore|flower|full_bloom|funnyflower|geranium|lotas|magnolia|mazzo|"
        r"mirjam|pink-rose|red_flower|sakura|simple_five|sun_flower|tulips)|unsorted/(rosa[12]|"
        r"rose|van_gogh)"
    ),
    "fruit": (
        r"food/(fruit/(?!apple_juice|champignon|gumnut|juice|pie|straw_tote|tile|turkey|tree|"
        r"kallisti|fruitcoll|candied)|(apple_|grapes|watermelon|pomodori))"
    ),
    "person": (
        r"people/(?!clothing|bodypart|smilies|magnifying|stickmen)[a-zA-Z_0-9.-]*(man|woman|"
        r"girl|boy|businessm|worker|farmer|person|dancer|lady|chef|soldier|king|queen|nurse|"
        r"doctor|kid|child|uomo|donna|bambin|ragazz)|unsorted/(ragazz|corridore|principessa|"
        r"carpentiere|Traslocatore|imbianchino|donna|signorina)"
    ),
}
ENGLISH = {
    "cavallo": "horse", "gatto": "cat", "gattina": "cat", "cane": "dog", "orso": "bear",
    "ours": "bear", "leone": "lion", "tigre": "tiger", "uccello": "bird", "gabbiano": "gull",
    "aquila": "eagle", "acquila": "eagle", "cigno": "swan", "gallo": "rooster",
    "farfalla": "butterfly", "coccinella": "ladybug", "zanzara": "mosquito", "formica": "ant",
    "lucertola": "lizard", "rana": "frog", "fiore": "flower", "albero": "tree", "casa": "house",
    "donna": "woman", "uomo": "man", "ragazza": "girl", "lampada": "lamp", "bussola": "compass",
    "chiave": "key", "tazza": "cup", "arbre": "tree",
}
"""English words of the Italian, French and other words in file names."""
NOT_WORDS = frozenset({
    "ganson", "architetto", "architett", "archite", "archit", "arch", "franc", "frances",
    "francesc", "francesco", "france", "nicu", "buculei", "jarno", "vasamaa", "linda", "kim",
    "benji", "park", "jonathan", "dietrich", "gerald", "jean", "victor", "balin", "mateya",
    "kurt", "cagle", "erich", "peterm", "mimooh", "simple", "the", "with", "for", "and", "from",
    "free", "net", "clip", "art", "svg",
})
"""Authors' names and fillers in file names."""
# fmt: on
