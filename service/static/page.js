// The front page: what is served, living pictures of what it makes, and a line to try it with.

const KINDS = { pca: "principal component analysis", ae: "autoencoder", vae: "variational autoencoder" };
const SAMPLES = 12;
const place = document.getElementById("models");

async function ask(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response;
  const problem = await response.json();
  throw new Error([problem.detail, problem.hint, `request ${problem.request_id}`].filter(Boolean).join("; "));
}

function say(error) {
  const line = document.createElement("p");
  line.className = "problem";
  line.textContent = error.message;
  return line;
}

function facts(model) {
  const metrics = Object.entries(model.metrics).map(([name, value]) => [name.replaceAll("_", " "), +value.toPrecision(4)]);
  return [
    ["shape of a row", model.shape.join(" × ")],
    ["latents", model.latents],
    ["calibration rows", model.calibration.rows],
    ...metrics,
  ];
}

async function picture(card, model) {
  const image = card.querySelector("img");
  const response = await ask(`/sample?model=${model.name}@${model.version}&n=${SAMPLES}`, {
    method: "POST",
    headers: { Accept: "image/png" },
  });
  const seed = response.headers.get("elbo-seed");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(await response.blob());
  image.alt = `${SAMPLES} samples from ${model.name}`;
  card.querySelector("figcaption").textContent = `${SAMPLES} samples, seed ${seed}`;
  card.querySelector("figure").hidden = false;
}

function show(model, isDefault) {
  const card = document.getElementById("card").content.cloneNode(true).firstElementChild;
  card.querySelector("h2").append(model.name, " ", Object.assign(document.createElement("small"), {
    textContent: `version ${model.version}${isDefault ? ", default" : ""}`,
  }));
  card.querySelector(".kind").textContent = KINDS[model.kind] ?? model.kind;
  for (const [name, value] of facts(model)) {
    card.querySelector("dl").append(
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    );
  }
  const line = `curl -X POST '${location.origin}/sample?model=${model.name}&n=2'`;
  card.querySelector("code").textContent = line;
  card.querySelector(".copy").addEventListener("click", (event) => {
    navigator.clipboard.writeText(line).then(() => (event.target.textContent = "Copied"));
  });
  if (model.pictures) {
    const again = card.querySelector(".again");
    const draw = () => picture(card, model).catch((error) => again.before(say(error)));
    again.hidden = false;
    again.addEventListener("click", draw);
    draw();
  }
  return card;
}

async function start() {
  const { models, failures, default: chosen } = await (await ask("/models")).json();
  const newest = models.filter((model, i) => models[i - 1]?.name !== model.name); // each name's newest comes first
  place.replaceChildren(...newest.map((model) => show(model, model.name === chosen)));
  for (const { name, version, detail } of failures) place.append(say(new Error(`${name}@${version}: ${detail}`)));
  if (!models.length) place.append(say(new Error("No model is served yet: run elbo demo, or elbo train.")));
}

start().catch((error) => place.replaceChildren(say(error)));
