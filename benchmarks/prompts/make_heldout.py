"""Write heldout.jsonl, the prompts that drafts are measured on and never trained on: 96 records of
{prompt, source}.

    python -m benchmarks.prompts.make_heldout

Half are instructions written for this file, half are questions of reasoning-gym (the `tasks`
extra), of tasks that no draft of this project is trained on. The two take turns, so that the first
few prompts are a mix too. Each is at most LIMIT tokens long, and so fits 128 together with
SmolLM2's chat template.
"""

import json
from pathlib import Path
from typing import Any

HELDOUT = Path(__file__).parent / "heldout.jsonl"
SEED, EACH, LIMIT = 77, 6, 98
# task -> options. Tasks whose questions follow Python's hashes (isomorphic_strings, ransom_note)
# are others every time.
TASKS = {"chain_sum": {}, "needle_haystack": {"min_num_statements": 4, "max_num_statements": 8},
         "lcm": {}, "number_format": {}, "count_primes": {}, "power_function": {},
         "complex_arithmetic": {}, "decimal_chain_sum": {}}
# four of a kind
WRITTEN = {
    "explain": ("Explain to a ten-year-old why the sky is blue.",
                "How does a refrigerator keep food cold? Explain it step by step.",
                "Explain the difference between weather and climate, with one example of each.",
                "Why do ships made of steel float while a steel nail sinks?"),
    "write": (
        "Write a polite email to my landlord asking for the broken heating in the kitchen to be "
        "repaired this week.",
        "Write a four-line poem about a lighthouse in winter.",
        "Write a product description for a wooden desk lamp, in about sixty words.",
        "Write a short speech for a friend's fortieth birthday. She loves hiking and bad puns."),
    "list": ("List eight things to pack for a weekend of camping in the mountains.",
             "Give me ten names for a small bakery near the sea.",
             "List the planets of the solar system in order from the sun, each with one fact.",
             "Name five indoor games that six children can play without any equipment."),
    "summarise": (
        "Summarise in one sentence: The town council met on Tuesday to discuss the old bridge. "
        "Engineers said that it could be repaired for two million, while a new one would cost "
        "five. After three hours the council voted to repair it and to close it to lorries until "
        "the work is done.",
        "Summarise the following in at most twenty words: Honeybees tell each other where flowers "
        "are by dancing. The angle of the dance shows the direction from the sun, and its length "
        "shows the distance. Bees that follow it find the flowers without having been there "
        "before.",
        "What is the main point of this paragraph? Many people believe that reading in dim light "
        "ruins the eyes. Doctors have found no lasting harm from it. The eyes may feel tired and "
        "dry afterwards, but they recover with rest, as other tired muscles do.",
        "Turn this into three bullet points: Our library opens at nine and closes at six, except "
        "on Thursdays, when it stays open until eight. Members may borrow ten books for three "
        "weeks. Late books cost ten cents a day, and children pay nothing."),
    "rewrite": (
        "Rewrite this more politely: You sent me the wrong size again. Fix it now.",
        "Correct the grammar: Him and me was going to the market when it start raining.",
        "Rewrite in the past tense: She opens the window, hears the birds and decides to walk to "
        "work.",
        "Make this sentence shorter without losing its meaning: Due to the fact that it was "
        "raining very heavily, we came to the decision that we would remain inside the house."),
    "code": ("Write a Python function that returns the longest word in a sentence.",
             "Write a JavaScript function that removes duplicates from an array, and show how to "
             "call it.",
             "What does this Python code print, and why? print([x * x for x in range(6) if x % 2])",
             "Write an SQL query that finds the three customers with the most orders in a table "
             "orders(id, customer_id)."),
    "advice": (
        "I have trouble falling asleep before exams. What can I do in the evening to calm down?",
        "How should I prepare for my first job interview as a nurse?",
        "My tomato plants have yellow leaves. What might be wrong and how do I fix it?",
        "I want to save money on groceries for a family of four. Give me some practical tips."),
    "story": ("Tell a short story about a fox who is afraid of the dark.",
              "Write the opening paragraph of a detective story that takes place on a night train.",
              "Tell a funny story about a robot that tries to bake bread for the first time.",
              "Write a short story that ends with the words: and the door was never locked again."),
    "translate": (
        "Translate into French: Where is the nearest train station? I need to be in Lyon by noon.",
        "Translate into Spanish: My sister has two cats and a very old dog.",
        "Translate into German: Tomorrow we will visit the museum and have lunch by the river.",
        "What does the Italian phrase 'chi va piano va sano e va lontano' mean in English?"),
    "question": ("What is the capital of Australia, and why is it not Sydney?",
                 "Who was Marie Curie and what is she best known for?",
                 "How many minutes are there in a week? Show how you work it out.",
                 "What happens to water at zero degrees Celsius, and why does ice float?"),
    "compare": (
        "Compare cats and dogs as pets for someone who lives in a small flat.",
        "What are the advantages and disadvantages of working from home?",
        "Which is better for a short trip across town, a bicycle or a bus? Give reasons for both.",
        "How do a novel and a short story differ?"),
    "instruct": ("Give me a simple recipe for pancakes with exact amounts.",
                 "How do I change a flat tyre on a bicycle? Number the steps.",
                 "Describe a ten-minute morning stretch for beginners.",
                 "How can I teach my dog to sit? Explain it in five short steps."),
}


def written() -> list[dict[str, str]]:
    """The instructions, one of each kind in turn."""
    return [{"prompt": prompts[number], "source": f"written for this file: {kind}"}
            for number in range(4) for kind, prompts in WRITTEN.items()]


def questions(tokenizer: Any) -> list[dict[str, str]]:
    """The first EACH questions of each task that are short enough, one of each task in turn."""
    import reasoning_gym

    def short(task: str) -> list[dict[str, str]]:
        made = reasoning_gym.create_dataset(task, seed=SEED, size=20, **TASKS[task])
        options = "".join(f" {name}={value}" for name, value in TASKS[task].items())
        records = [{"prompt": made[i]["question"], "source": f"reasoning_gym:{task} seed={SEED} "
                    f"index={i}{options}"} for i in range(len(made))]
        return [record for record in records
                if len(tokenizer.encode(record["prompt"])) <= LIMIT][:EACH]

    return [record for turn in zip(*map(short, TASKS), strict=True) for record in turn]


def main() -> None:
    import jspec

    tokenizer = jspec.load_tokenizer("smollm2-135m-instruct")
    pairs = zip(written(), questions(tokenizer), strict=True)
    records = [record for pair in pairs for record in pair]
    long = [record["source"] for record in records
            if len(tokenizer.encode(record["prompt"])) > LIMIT]
    assert not long, f"over {LIMIT} tokens: {long}"
    HELDOUT.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
                       encoding="utf-8")


if __name__ == "__main__":
    main()
