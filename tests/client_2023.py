"""The calls of the 2023 guide with openai 0.28.1 as it is, against a running server: a script for an environment of its own.

python client_2023.py BASE_URL KEY OTHER_KEY TRAINING_FILE MODEL
"""

# ruff: noqa: SIM115  (files are opened as the guide opens them)
import asyncio
import base64
import struct
import sys
import time

import openai

base, key, other, path, model = sys.argv[1:]
openai.api_base, openai.api_key = base, key
assert openai.version.VERSION == "0.28.1"
error = openai.error


def refused(kind, call, *args, **more):
    """A call that must be refused with an error that this client can read."""
    try:
        call(*args, **more)
    except kind as wrong:
        assert type(wrong) is kind and str(wrong) and wrong.json_body["error"].keys() == {"message", "type", "param", "code"}, wrong
        return wrong
    raise AssertionError("it was not refused")


# ---- files: the literal file name "file", and the content type application/octet-stream

with open(path, "rb") as lines:
    data = lines.read()
file = openai.File.create(file=open(path, "rb"), purpose="fine-tune")
assert file.object == "file" and file.id.startswith("file-") and file.filename == "file" and file.bytes == len(data)
named = openai.File.create(file=open(path, "rb"), purpose="fine-tune", user_provided_filename="mydata.jsonl")
assert named.filename == "mydata.jsonl"
assert openai.File.retrieve(file.id).status == "processed"
assert openai.File.download(file.id) == data
assert {file.id, named.id} <= {one.id for one in openai.File.list().data}
assert openai.File.delete(named.id).deleted is True
refused(error.InvalidRequestError, openai.File.retrieve, named.id)
refused(error.InvalidRequestError, openai.File.create, file=open(path, "rb"), purpose="something else")

# ---- jobs

job = openai.FineTuningJob.create(training_file=file.id, model=model, suffix="old-client", hyperparameters={"n_epochs": 1})
assert job.object == "fine_tuning.job" and job.hyperparameters.n_epochs == 1 and job.status == "validating_files"
spare = openai.FineTuningJob.create(training_file=file.id, model=model)
cancelled = openai.FineTuningJob.cancel(spare.id)
assert cancelled.status == "cancelled", cancelled
refused(error.InvalidRequestError, openai.FineTuningJob.cancel, spare.id)
assert [one.id for one in openai.FineTuningJob.list(limit=2).data] == [spare.id, job.id]
assert [one.id for one in openai.FineTuningJob.auto_paging_iter(limit=1)][:2] == [spare.id, job.id]
assert openai.FineTuningJob.list(limit=1).has_more is True
refused(error.InvalidRequestError, openai.FineTuningJob.create, training_file="file-none", model=model)
refused(error.InvalidRequestError, openai.FineTuningJob.create, training_file=file.id, model="gpt-9")
refused(error.InvalidRequestError, openai.FineTuningJob.create, training_file=file.id, model=model, n_epochs=4)  # of the older FineTune
refused(error.InvalidRequestError, openai.FineTuningJob.retrieve, "ftjob-none")
refused(error.InvalidRequestError, openai.FineTune.list)  # gone since 2024
short = job.id.replace("ftjob-", "ft-")  # as ids were in August 2023
until = time.time() + 240
while (now := openai.FineTuningJob.retrieve(short)).status not in ("succeeded", "failed", "cancelled"):
    assert time.time() < until, now
    time.sleep(0.2)
assert now.status == "succeeded", now
assert now.fine_tuned_model.startswith(f"ft:{model}:local:old-client:") and now.trained_tokens > 0 and now.finished_at
events = openai.FineTuningJob.list_events(id=job.id, limit=50)
assert events.data[0].message == "The job has successfully completed" and events.data[-1].message == f"Created fine-tuning job: {job.id}"
assert len(openai.FineTuningJob.list_events(id=job.id, limit=2).data) == 2
assert openai.File.download(now.result_files[0]).startswith(b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")

# ---- models and answers: the tuned one and its base

tuned = now.fine_tuned_model
assert {model, tuned} <= {one.id for one in openai.Model.list().data} and openai.Model.retrieve(tuned).id == tuned
asked = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "How do I make tea?"}]
for name in (model, tuned):
    answer = openai.ChatCompletion.create(model=name, messages=asked, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion" and isinstance(answer.choices[0].message.content, str) and answer.usage.completion_tokens > 0
    pieces = list(openai.ChatCompletion.create(model=name, messages=asked, max_tokens=8, temperature=0, stream=True))
    text = "".join(piece.choices[0].delta.get("content") or "" for piece in pieces if piece.choices)
    assert text == answer.choices[0].message.content
again = asyncio.run(openai.ChatCompletion.acreate(model=tuned, messages=asked, max_tokens=8, temperature=0))
assert again.choices[0].message.content == answer.choices[0].message.content
told = openai.Completion.create(model=model, prompt="tea is", max_tokens=3, echo=True, logprobs=2, temperature=0)
assert told.object == "text_completion" and told.choices[0].text.startswith("tea is") and told.choices[0].logprobs.tokens
one = openai.Embedding.create(model=model, input=["tea"])
assert one.data[0].embedding and all(isinstance(x, float) for x in one.data[0].embedding)
raw = openai.Embedding.create(model=model, input="tea", encoding_format="base64").data[0].embedding
raw = raw if isinstance(raw, list) else list(struct.unpack(f"<{len(base64.b64decode(raw)) // 4}f", base64.b64decode(raw)))
assert max(abs(a - b) for a, b in zip(raw, one.data[0].embedding, strict=True)) < 1e-5
assert openai.Moderation.create(input="some text").results[0].flagged is False

# ---- whose it is, and its end

openai.api_key = other
refused(error.InvalidRequestError, openai.File.retrieve, file.id)
refused(error.InvalidRequestError, openai.Model.delete, tuned)
refused(error.InvalidRequestError, openai.ChatCompletion.create, model=tuned, messages=asked)
openai.api_key = "sk-of-nobody-0123456789"
refused(error.AuthenticationError, openai.File.list)
openai.api_key = key
assert openai.Model.delete(short).deleted is True  # by the job's id, as the guide has it
refused(error.InvalidRequestError, openai.ChatCompletion.create, model=tuned, messages=asked)
refused(error.InvalidRequestError, openai.Model.delete, tuned)
refused(error.InvalidRequestError, openai.Model.delete, model)
print("conforms")
