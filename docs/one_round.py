"""One round of the algorithm on one page, without Flower: python docs/one_round.py

Two cities share a frozen base model. Each trains the global adapter on its own universal rules, the
server averages the updates, and each city then fits its private local adapter to the average.
"""

from pathlib import Path

from fedlora_app.config import BOTH, GLOBAL, LOCAL, load_config, plan_round
from fedlora_app.data import CONFLICT, build_question_sets, load_client_files, tokenize_client_files
from fedlora_app.evaluation import evaluate_questions
from fedlora_app.federation import build_rule
from fedlora_app.foundation import derive_seed
from fedlora_app.model import (
    attach_once,
    build_initial_state,
    get_state,
    load_base_model,
    set_state,
)
from fedlora_app.training import choose_decays, select_examples, train_phase

ROOT = Path(__file__).resolve().parents[1]
SERVER_ROUND, NUM_STEPS = 1, 60

config = load_config(ROOT / "conf/demo.yaml")
plan = plan_round(config, SERVER_ROUND)
loaded = load_base_model(config.model, ROOT)  # frozen, one for all clients
model = attach_once(loaded, config.adapters)  # W0 x + s_G B_G A_G x + s_L B_L A_L x
files = {c.id: load_client_files(config, c, ROOT) for c in config.federated.clients}


def train(client, phase):
    """Train the phase's adapters on what this client may use in it; return how many examples."""
    tokens = tokenize_client_files(config, client, files[client.id], loaded.tokenizer, ROOT)
    examples = select_examples(config, client.id, tokens, phase, SERVER_ROUND)
    seed = derive_seed(config.experiment.seed, phase.name, SERVER_ROUND, client.id)
    train_phase(
        model,
        examples,
        config.training,
        active=phase.active,
        trainable=phase.trainable,
        num_steps=NUM_STEPS,
        run_span=(0.0, 1.0),
        weight_decays=choose_decays(config, phase, NUM_STEPS),  # keep the local adapter small
        seed=seed,
    )
    return len(examples)


# 1. Every client trains the global adapter alone, from the same start, on its universal records.
start = build_initial_state(model, GLOBAL, derive_seed(config.experiment.seed, "initial"))
rule = build_rule(config)
rule.begin(start, SERVER_ROUND)
for client in config.federated.clients:
    set_state(model, GLOBAL, start)
    num_examples = train(client, plan.train)
    trained = get_state(model, GLOBAL)
    update = {key: trained[key] - start[key] for key in start}  # all that is sent
    rule.add(client.id, update, num_examples)

# 2. The server averages the updates, weighted by the numbers of examples. It needs no model.
average = rule.result()

# 3. Every client fits its own local adapter beside the frozen average, and keeps it to itself.
for client in config.federated.clients:
    set_state(model, GLOBAL, average)
    seed = derive_seed(config.experiment.seed, "initial", client.id)
    set_state(model, LOCAL, build_initial_state(model, LOCAL, seed))
    train(client, plan.personalise)
    # 4. The same question, answered with both adapters.
    asked = build_question_sets(client, files[client.id])[CONFLICT][:1]
    settings = {"system_prompt": client.system_prompt, "settings": config.evaluation}
    score = evaluate_questions(model, loaded.tokenizer, asked, active=BOTH, **settings)[0]
    print(f'{client.id}: "{asked[0].text}" -> "{score.generated}" (own: "{asked[0].answer}")')
