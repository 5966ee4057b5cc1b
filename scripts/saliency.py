"""How fast token saliency follows typing, and how its quick leave-one-out compares with the exact one: python scripts/saliency.py"""

import statistics
import time

from scipy.stats import spearmanr

from saddlepoint.policies import load
from saddlepoint.saliency import saliency
from saddlepoint.targets import open_target
from saddlepoint.types import user

MORE = " Start your answer with the words that I gave you before, please, and do not leave anything out of it, my good friend, thank you so much."
model = open_target("organism")
behaviors = load("fictional").select("harmful", "test")[:6]
ranks = []
for b in behaviors:
    ids = model.ids(b.prompt + MORE)[:40]
    text = model.tokenizer.decode(ids)
    quick, exact = ([t.leave_one_out for t in saliency(model, user(text), b.affirmative, exact=e).tokens] for e in (False, True))
    ranks.append(float(spearmanr(quick, exact).correlation))
print("rank correlation of quick and exact leave-one-out:", [round(r, 2) for r in ranks])
seconds = []
for i in range(20):
    text = model.tokenizer.decode(ids[:38] + ids[20 + i % 10 : 22 + i % 10])  # the last two tokens are typed anew
    began = time.perf_counter()
    saliency(model, user(text), behaviors[-1].affirmative)
    seconds.append(time.perf_counter() - began)
print(
    f"40 tokens: p50 {1000 * statistics.median(seconds):.0f} ms, from {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f}, n={len(seconds)}"
)
