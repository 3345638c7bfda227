"""Rebuild ``assets/drawings.parquet`` from Debian's ``openclipart-png`` (public domain,
CC0).

    apt-get install openclipart-png
    python -m coin_ray.demo.build.drawings --everything build/everything.parquet

The repository ships the drawings of the eight classes and the target's clutter.
``--everything`` writes a second file with all usable drawings, which only the training
of the tiny CLIP reads.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from coin_ray.demo.drawings import ASSETS, CLASSES

ORIGIN = Path("/usr/share/openclipart/png")
LONG_SIDE = 96
SHARES = {"source": 0.45, "target": 0.35, "unseen": 0.20}
KNOWN_TO_CLOUD, KNOWN_TO_CLIP = 0.50, 0.60
SHIPPED_CLUTTER = 120

NOT_PICTURES = re.compile(
    r"shapes/|computer/(icons|buttons)|buttons/|recreation/games/cards|signs_and_symbols/(flags|led|map_symbols)"
    r"|aiga-symbols|roadsigns|special/|boating_rules|sailing_|knot_|unsorted/duplicates"
)
CLUTTER = re.compile(
    r"(tools|office|computer|electronics|education|science|containers|signs_and_symbols"
    r"|recreation/(music|sports|games)|geography|decorations|logos)"
)
CLASS_FILES = {
    "bird": r"animals/birds/(?!contour_bat|simbolo|wing_|turkey_on|stormo|mirjam|manager)"
    r"|animals/(emperor_penguin|new_penguin|pinguino|baby-tux|ralf_ark)"
    r"|unsorted/(Anatra|Colombo|colombo2|Pinguino|gabbiano|papera|pennuto|struzzo|marchio_gallina)",
    "bug": r"animals/bugs/(?!virus|lumaca|quattro|mostric)|animals/(mosquito|scorpion|punaisa)|unsorted/(ape_miele|caterpillar)",
    "cat": r"animals/mammals/(housecats/|big_cats/|cartoon_cat)|unsorted/set_gatti",
    "car": r"transportation/(vehicles/)?(hummers/|hummer|1989_chev|_chevrolet|4wd|blazer|old_car|redcar|skoda|sportcar"
    r"|shelby_cobra_car|toyota|dodge|car_jamin|car\.png|bmw|formula|autos|ambulans|bus[12_]|bus\.png"
    r"|big_truck|small_truck|old_truck|truck_|fire_engine)|unsorted/ambulanza",
    "house": r"buildings/homes/|buildings/(house|perspectival_house|church|school_country|firestation|carnegie)"
    r"|unsorted/(Condominio|fattoria|igloo)",
    "flower": r"plants/(flowers/)?(?!cactus|cartoon_tree|flower-pot)(bouquet|daffodil|daisy|dream_flower|fiore|flower|full_bloom"
    r"|funnyflower|geranium|lotas|magnolia|mazzo|mirjam|pink-rose|red_flower|sakura|simple_five|sun_flower|tulips)"
    r"|unsorted/(rosa[12]|rose|van_gogh)",
    "fruit": r"food/(fruit/(?!apple_juice|champignon|gumnut|juice|pie|straw_tote|tile|turkey|tree|kallisti|fruitcoll|candied)"
    r"|(apple_|grapes|watermelon|pomodori))",
    "person": r"people/(?!clothing|bodypart|smilies|magnifying|stickmen)[a-zA-Z_0-9.-]*(man|woman|girl|boy|businessm|worker|farmer"
    r"|person|dancer|lady|chef|soldier|king|queen|nurse|doctor|kid|child|uomo|donna|bambin|ragazz)"
    r"|unsorted/(ragazz|corridore|principessa|carpentiere|Traslocatore|imbianchino|donna|signorina)",
}
ENGLISH = {
    "cavallo": "horse", "gatto": "cat", "gattina": "cat", "cane": "dog", "orso": "bear", "ours": "bear", "leone": "lion",
    "tigre": "tiger", "uccello": "bird", "gabbiano": "gull", "aquila": "eagle", "acquila": "eagle", "cigno": "swan",
    "gallo": "rooster", "farfalla": "butterfly", "coccinella": "ladybug", "zanzara": "mosquito", "formica": "ant",
    "lucertola": "lizard", "rana": "frog", "fiore": "flower", "albero": "tree", "casa": "house", "donna": "woman",
    "uomo": "man", "ragazza": "girl", "lampada": "lamp", "bussola": "compass", "chiave": "key", "tazza": "cup", "arbre": "tree",
}  # fmt: skip
NOT_WORDS = frozenset(
    {
        *(
            "ganson",
            "architetto",
            "architett",
            "archite",
            "archit",
            "arch",
            "franc",
            "frances",
            "francesc",
            "francesco",
            "france",
            "nicu",
        ),
        *(
            "buculei",
            "jarno",
            "vasamaa",
            "linda",
            "kim",
            "benji",
            "park",
            "jonathan",
            "dietrich",
            "gerald",
            "jean",
            "victor",
            "balin",
        ),
        *(
            "mateya",
            "kurt",
            "cagle",
            "erich",
            "peterm",
            "mimooh",
            "simple",
            "the",
            "with",
            "for",
            "and",
            "from",
            "free",
            "net",
            "clip",
        ),
        *("art", "svg"),
    }
)
"""Authors' names and fillers in file names."""


def words_of(name: str) -> list[str]:
    """English nouns from the file's name and its folder, authors' names removed."""
    folder, stem = name.rsplit("/", 2)[-2:] if name.count("/") > 1 else name.split("/")
    stem_words = [w.lower() for w in re.split(r"[^A-Za-z]+", stem[:-4]) if len(w) > 2]
    folder_words = [
        w.rstrip("s")
        for w in re.split("[/_]", folder)
        if len(w) > 2 and w not in ("and", "unsorted")
    ]
    return [ENGLISH.get(w, w) for w in stem_words if w not in NOT_WORDS][
        :2
    ] + folder_words


def group_of(name: str) -> str:
    """Drawings of one group are near-duplicates (numbered, black-and-white, outline)
    and stay in one share.
    """
    stem = name.rsplit("/", 1)[-1][:-4].lower()
    stem = re.sub(r"(_|\b)(bw|contour|outline|colour|color)(?=_|\b)", "", stem)
    return re.sub(r"[^a-z]", "", stem)[:14]


def label_of(name: str) -> str | None:
    return next(
        (
            label
            for label, pattern in CLASS_FILES.items()
            if re.match(f"({pattern})", name)
        ),
        None,
    )


def cut_out(name: str) -> Image.Image | None:
    """The drawing cropped to its opaque part, or None if it is too small, too thin, too
    faint or has no transparency.
    """
    try:
        image: Image.Image = Image.open(ORIGIN / name)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if image.mode not in ("RGBA", "LA", "P"):
        return None
    image = image.convert("RGBA")
    opaque = np.asarray(image)[..., 3] > 40
    ys, xs = np.nonzero(opaque)
    if len(ys) < 400 or opaque.all():
        return None
    left, top, right, bottom = (
        int(xs.min()),
        int(ys.min()),
        int(xs.max()) + 1,
        int(ys.max()) + 1,
    )
    width, height = right - left, bottom - top
    covered = opaque[top:bottom, left:right].mean()
    if (
        covered < 0.12
        or max(width, height) / min(width, height) > 4
        or min(width, height) < 24
    ):
        return None
    image = image.crop((left, top, right, bottom))
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def usable_drawings() -> list[dict[str, Any]]:
    names = sorted(str(p.relative_to(ORIGIN)) for p in ORIGIN.rglob("*.png"))
    names = [n for n in names if not NOT_PICTURES.search(n)]
    with ProcessPoolExecutor(2) as pool:
        images = list(pool.map(cut_out, names, chunksize=16))
    seen: set[bytes] = set()
    rows = []
    for name, image in zip(names, images, strict=True):
        if image is None:
            continue
        thumbnail = image.resize((24, 24)).tobytes()
        if thumbnail in seen:
            continue
        seen.add(thumbnail)
        rows.append(
            {
                "name": name,
                "label": label_of(name),
                "group": group_of(name),
                "words": words_of(name),
                "image": image,
            }
        )
    return rows


def assign_shares(rows: list[dict[str, Any]]) -> None:
    """Deal whole near-duplicate groups to the shares, class by class, largest group
    first.
    """
    order = random.Random(7)
    for label in (None, *CLASSES):
        groups = defaultdict(list)
        for row in rows:
            if row["label"] == label:
                groups[row["group"]].append(row)
        names = sorted(groups)
        order.shuffle(names)
        wanted = {
            share: part * sum(map(len, groups.values()))
            for share, part in SHARES.items()
        }
        dealt = dict.fromkeys(SHARES, 0)
        for name in sorted(names, key=lambda n: -len(groups[n])):
            share = max(wanted, key=lambda s: (wanted[s] - dealt[s]) / wanted[s])
            dealt[share] += len(groups[name])
            for row in groups[name]:
                row["share"] = share


def assign_knowledge(rows: list[dict[str, Any]]) -> None:
    """Which target drawings each teacher has seen in training: independent draws of
    whole groups, class by class.
    """
    for row in rows:
        row["known_to_cloud"] = row["known_to_clip"] = row["share"] == "source"
    for teacher, fraction, seed in (
        ("known_to_cloud", KNOWN_TO_CLOUD, 1),
        ("known_to_clip", KNOWN_TO_CLIP, 2),
    ):
        for index, label in enumerate((None, *CLASSES)):
            target = [r for r in rows if r["share"] == "target" and r["label"] == label]
            groups = sorted({row["group"] for row in target})
            random.Random(1000 * seed + index).shuffle(groups)
            known: list[dict[str, Any]] = []
            for group in groups:
                if len(known) < round(fraction * len(target)):
                    known += [row for row in target if row["group"] == group]
            for row in known:
                row[teacher] = True


def write_drawings(rows: Iterable[dict[str, Any]], path: Path) -> None:
    def webp(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=90, method=6)
        return buffer.getvalue()

    columns = (
        "name",
        "label",
        "group",
        "share",
        "known_to_cloud",
        "known_to_clip",
        "words",
    )
    table = pa.Table.from_pylist(
        [{k: r[k] for k in columns} | {"webp": webp(r["image"])} for r in rows]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    print(f"{path}: {table.num_rows} drawings, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--everything", type=Path, required=True)
    rows = usable_drawings()
    assign_shares(rows)
    assign_knowledge(rows)
    clutter = [
        r
        for r in rows
        if r["label"] is None and r["share"] == "target" and CLUTTER.match(r["name"])
    ]
    source_clutter = [
        r
        for r in rows
        if r["label"] is None and r["share"] == "source" and CLUTTER.match(r["name"])
    ]
    draw = random.Random(3)
    shipped = (
        [r for r in rows if r["label"]]
        + draw.sample(clutter, SHIPPED_CLUTTER)
        + draw.sample(source_clutter, SHIPPED_CLUTTER // 2)
    )
    write_drawings(shipped, ASSETS / "drawings.parquet")
    write_drawings(rows, parser.parse_args().everything)
    for label in CLASSES:
        print(
            label,
            {
                s: sum(r["label"] == label and r["share"] == s for r in rows)
                for s in SHARES
            },
        )


if __name__ == "__main__":
    main()
