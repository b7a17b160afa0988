"""Small made-up data on which an environment's real server plays; servers/make_data.py makes it in that one's own Python,
whose libraries write the formats that its server reads.

What is played on it tests servers, prompts and rewards; its scores say nothing of a model.
"""
import importlib
import json
import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
from typing import Any, Dict, List, Tuple

ABOUT = "about.json"  # what a server says of its data: servers/serve.py


def write(path: str, text: str) -> None:
    """Write a text file with the folders above it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str, value: Any) -> None:
    """Write a JSON file with the folders above it."""
    write(path, json.dumps(value))


HOUSE = """(define (problem toy-{number})
 (:domain alfred)
 (:objects agent1 - agent {places} - location {furniture} - receptacle {thing} - object
           {kinds} - rtype {what}Type - otype)
 (:init (= (total-cost) 0) (atLocation agent1 spot_bar_0) {facts}
        (objectType {thing} {what}Type) (pickupable {thing}) (inReceptacle {thing} {start}) (objectAtLocation {thing} {at}))
 (:goal (exists (?r - receptacle ?o - object)
   (and (inReceptacle ?o ?r) (objectType ?o {what}Type) (receptacleType ?r {goal}Type))))
)"""


def house(number: int) -> Tuple[str, str]:
    """Return one problem in ALFRED's words: bring a thing from a desk into a cabinet or a drawer; and its goal in words."""
    what = ("Mug", "Book", "Apple", "Pen")[number % 4]
    goal = ("Cabinet", "Drawer")[number // 4 % 2]
    kinds = [goal, "Desk", *["Shelf"] * (number % 3)]

    def named(kind: str, place: int) -> str:
        return f"{kind}_bar__plus_00_dot_{place:02}_bar__plus_01_dot_00_bar__plus_00_dot_{number % 100:02}"

    furniture = [named(kind, place) for place, kind in enumerate(kinds)]
    places = [f"spot_bar_{place}" for place in range(len(kinds) + 1)]
    facts = [
        f"(receptacleType {one} {kind}Type) (receptacleAtLocation {one} {place}) (canContain {kind}Type {what}Type)"
        for one, kind, place in zip(furniture, kinds, places[1:])
    ]
    text = HOUSE.format(number=number,
                        places=" ".join(places),
                        furniture=" ".join(furniture),
                        thing=named(what, 50),
                        kinds=" ".join(sorted({kind + "Type"
                                               for kind in kinds})),
                        what=what,
                        facts=" ".join([*facts, f"(openable {furniture[0]})"]),
                        start=furniture[1],
                        at=places[2],
                        goal=goal)
    return text, f"put a {what.lower()} in the {goal.lower()}"


def alfworld(out: str, source: str) -> None:
    """The first games of train and test; domain and grammar are those that the package alfworld brings."""
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
    with open(ALFRED_PDDL_PATH) as file:
        domain = file.read()
    with open(ALFRED_TWL2_PATH) as file:
        grammar = file.read()
    write(out + "/logic/alfred.pddl", domain)
    write(out + "/logic/alfred.twl2", grammar)
    for split, folder in (("train", "train"), ("test", "valid_train")):
        with open(f"{source}/agentenv-alfworld/configs/mappings_{split}.json") as file:
            games = json.load(file)[:8]
        for game in games:
            problem, goal = house(game["item_id"])
            write_json(
                "{}/json_2.1.1/{}/{}/{}/game.tw-pddl".format(out, folder, game["task_type"], game["task_id"]), {
                    "pddl_domain": domain,
                    "grammar": grammar.replace("UNKNOWN GOAL", goal),
                    "pddl_problem": problem,
                    "solvable": True,
                    "walkthrough": []
                })


def webshop(out: str, source: str) -> None:
    """Twelve products, their goals and search index, and a language model without knowledge of any."""
    import spacy
    colours, things = ("red", "blue", "green"), (("cotton shirt", "fashion"), ("steel bottle", "sports"),
                                                 ("desk lamp", "electronics"), ("leather belt", "fashion"))
    products: List[Dict[str, Any]] = []
    attributes, instructions = {}, {}
    for number in range(12):
        thing, category = things[number // 3]
        name = f"{colours[number % 3]} {thing}"
        asin, words = f"B0TOY{number:05}", [thing.split()[0]]
        products.append({
            "asin": asin,
            "category": category,
            "query": name,
            "product_category": "Toys › " + category,
            "name": name,
            "full_description": f"A {name} that nobody made.",
            "small_description": [name + " of good quality"],
            "pricing": f"${10 + number}.00",
            "images": ["http://localhost/none.jpg"],
            "customization_options": {
                "size": [{
                    "value": "small"
                }, {
                    "value": "large"
                }]
            }
        })
        attributes[asin] = {"attributes": words, "instruction": f"Find me a {name}", "instruction_attributes": words}
        instructions[asin] = [{
            "asin": asin,
            "instruction": f"i want a small {name}",
            "instruction_attributes": words,
            "instruction_options": ["small"]
        }]
    write_json(out + "/items_shuffle_1000.json", products)
    write_json(out + "/items_ins_v2_1000.json", attributes)
    write_json(out + "/items_human_ins.json", instructions)
    texts = out + "/texts"
    write(
        texts + "/documents.jsonl", "".join(
            json.dumps({
                "id": one["asin"],
                "contents": (one["name"] + " " + one["full_description"]).lower(),
                "product": one
            }) + "\n" for one in products))
    index(texts, out + "/indexes_1k")
    shutil.rmtree(texts)
    spacy.blank("en").to_disk(out + "/en_core_web_lg")


def index(texts: str, out: str) -> None:
    """Make webshop's search index of the documents in the folder `texts`."""
    subprocess.run([
        sys.executable, "-m", "pyserini.index.lucene", "--collection", "JsonCollection", "--input", texts, "--index",
        out, "--generator", "DefaultLuceneDocumentGenerator", "--threads", "1", "--storePositions", "--storeDocvectors",
        "--storeRaw"
    ],
                   check=True,
                   stdout=subprocess.DEVNULL)


def sqlgym(out: str, source: str) -> None:
    """Three questions over one database in each split, in BIRD's layout."""
    for split in ("train", "dev"):
        name = "toy_" + split
        asked = [("How many towns are there?", "SELECT count(*) FROM town"),
                 ("Which town has the most people?", "SELECT name FROM town ORDER BY people DESC LIMIT 1"),
                 ("How many people live in the north?", "SELECT sum(people) FROM town WHERE region = 'north'")]
        write_json(f"{out}/{split}/{split}.json", [{
            "question_id": number,
            "db_id": name,
            "question": question,
            "evidence": "",
            "SQL": sql,
            "difficulty": "simple"
        } for number, (question, sql) in enumerate(asked)])
        columns = ["name", "region", "people"]
        write_json(f"{out}/{split}/{split}_tables.json",
                   [{
                       "db_id": name,
                       "table_names": ["town"],
                       "column_names": [[-1, "*"], *([0, column] for column in columns)],
                       "primary_keys": [1],
                       "foreign_keys": []
                   }])
        file = f"{out}/{split}/{split}_databases/{name}/{name}.sqlite"
        os.makedirs(os.path.dirname(file))
        database = sqlite3.connect(file)
        with database:
            database.execute("CREATE TABLE town (name TEXT, region TEXT, people INTEGER)")
            database.executemany("INSERT INTO town VALUES (?, ?, ?)", [("Ahof", "north", 1200), ("Bhof", "south", 300),
                                                                       ("Chof", "north", 50)])
        database.close()


def academia(out: str, source: str) -> None:
    """Four papers and three authors, as networkx graphs."""
    import networkx
    papers, authors = networkx.Graph(), networkx.Graph()
    titles, people = [f"Paper {one}" for one in "ABCD"], ["Ann Author", "Bob Author", "Cem Author"]
    for number, title in enumerate(titles):
        papers.add_node(number,
                        title=title,
                        abstract=f"About {title}.",
                        year=2000 + number,
                        keywords=["toys"],
                        doc_type="Conference",
                        venue="Toy Conference",
                        n_citation=number)
    papers.add_edges_from([(0, 1), (1, 2)])
    for number, name in enumerate(people):
        authors.add_node(number, name=name, org=f"Toy University {number}")
    authors.add_edge(0, 1, weight=1, papers=[0])
    authors.add_edge(1, 2, weight=2, papers=[1, 2])
    for name, value in (("paper_net", papers), ("author_net", authors), ("title2id_dict", {
            title: number
            for number, title in enumerate(titles)
    }), ("id2title_dict", dict(enumerate(titles))), ("author2id_dict", {
            name: number
            for number, name in enumerate(people)
    }), ("id2author_dict", dict(enumerate(people)))):
        with open(f"{out}/{name}.pkl", "wb") as file:
            pickle.dump(value, file)


def searchqa(out: str, source: str) -> None:
    """Thirty-two documents with vectors of an encoder of one layer, drawn at random, and a flat index of them."""
    import faiss
    import numpy
    import pandas
    import torch
    transformers: Any = importlib.import_module("transformers")  # the pinned one's names, which newer ones lack
    encoder = out + "/e5-base-v2"
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + one for one in letters)]
    write(encoder + "/vocab.txt", "\n".join(words))
    transformers.BertTokenizerFast(encoder + "/vocab.txt").save_pretrained(encoder)
    torch.manual_seed(0)
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(words),
                                hidden_size=64,
                                num_hidden_layers=1,
                                num_attention_heads=2,
                                intermediate_size=64)).save_pretrained(encoder)
    facts = [(f"town {number}", f"river {random.Random(number).randint(100, 999)}") for number in range(32)]
    write(
        out + "/wiki-18.jsonl", "".join(
            json.dumps({
                "id": str(number),
                "contents": f'"{town}"\nThe {town} lies at the {river}.'
            }) + "\n" for number, (town, river) in enumerate(facts)))
    vectors = numpy.random.RandomState(0).randn(len(facts), 64).astype("float32")
    faiss.normalize_L2(vectors)
    flat = faiss.IndexFlatIP(64)
    flat.add(vectors)
    faiss.write_index(flat, out + "/e5_Flat.index")
    os.makedirs(out + "/queries")
    for split, asked in (("test", facts[:16]), ("train", facts[16:])):
        rows = []
        for number, (town, river) in enumerate(asked):
            question = f"Where does {town} lie?"
            rows.append({
                "id": f"{split}_{number}",
                "question": question,
                "golden_answers": [river],
                "data_source": "nq",
                "prompt": [{
                    "role": "user",
                    "content": question
                }],
                "ability": "fact-reasoning",
                "reward_model": {
                    "style": "rule",
                    "ground_truth": {
                        "target": [river]
                    }
                },
                "extra_info": {
                    "split": split,
                    "index": number
                }
            })
        pandas.DataFrame(rows).to_parquet(f"{out}/queries/{split}.parquet")


TOYS = {"academia": academia, "alfworld": alfworld, "searchqa": searchqa, "sqlgym": sqlgym, "webshop": webshop}
