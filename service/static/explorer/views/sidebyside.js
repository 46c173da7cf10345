// The same view for every kind of model beside each other: an autoencoder's gaps, a VAE's smoothness, PCA's straight lines.

import { Following, decode, detail } from "../api.js";
import { card, h, math, Z, toggle, vector } from "../dom.js";
import { mean, zeros } from "../algebra.js";
import { LatentMap, planeOf, priorOf } from "../map.js";
import { figure } from "../rows.js";
import { Place, say } from "../say.js";
import { KINDS } from "./models.js";
import { survey } from "./latent.js";

const GRID = 9;

/** A section with a small map for each model whose rows have the shape of `view.model`'s. */
export function sideBySide(view) {
  const like = view.models.filter((model) => model.shape.join() === view.model.shape.join());
  const maps = h("div", { class: "beside" });
  view.beside = [];
  const begin = () => like.forEach((model) => {
    const place = new Place("small");
    maps.append(place.element);
    place.fill(async () => small(view, { ...(await detail(model)), exhibits: model.exhibits }));
  });
  const observer = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); begin(); }
  }, { rootMargin: "200px" });
  observer.observe(maps);
  return card("Side by side", h("p", { class: "quiet" }, "The codes of the same kind of rows, and what lies between them. An autoencoder leaves gaps where it never learnt to decode; a VAE's prior fills its space, so that points between codes decode to something; PCA changes along straight lines. Move over a map to decode there."),
    h("div", { class: "line" }, toggle("Decodings of all", false, (on) => view.beside.forEach((map) => map.decodings(on)))), maps);
}

async function small(view, model) {
  const seen = await survey(model);
  const current = model.kind === "vae" ? zeros(model.latents) : mean(seen.codes);
  const plane = planeOf(seen.codes, model.latents > 2 ? "pc" : "0,1", model.latents);
  const output = h("div", { class: "output" }), where = h("code", { class: "z" });
  const following = new Following(async (signal, z) => {
    try {
      const [x] = await decode(model, [z], signal);
      output.replaceChildren(figure(model, x, `decoded by ${model.name} at ${vector(z, 4)}`));
      where.textContent = vector(z, 3);
    } catch (error) {
      if (error.name !== "AbortError") output.replaceChildren(say(error));
    }
  });
  const move = (z) => { map.current = z; map.drawTop(); following.want(z); };
  const map = new LatentMap({ model, label: `small map of ${model.name}; arrow keys move the point`, onhover: (z) => following.want(z), onleave: () => following.want(map.current), onmove: move, onpick: move });
  map.decodings = async (on) => {
    map.grid = on ? { rows: await decode(model, map.lattice(GRID)), count: GRID } : null;
    map.draw();
  };
  map.show({ plane, prior: priorOf(model, plane, seen.draws), points: seen.points, current });
  view.beside.push(map);
  following.want(current);
  return h("figure", { class: "small-map" }, h("figcaption", {}, h("strong", {}, model.name), " ", h("span", { class: "quiet" }, KINDS[model.kind] ?? model.kind)),
    map.element, h("div", { class: "under" }, output, h("span", {}, math(Z), " ", where)));
}
