// Shapes on the canvas of the map. Each has an outline, so that it is visible on any background.

import { cssColour } from "../ui/colours.js";

const FONT = "system-ui, sans-serif";
const FULL_CIRCLE = 2 * Math.PI;

/** Size a canvas for the screen's pixel ratio, and return its context in CSS pixels. */
export function resizeCanvas(canvas, size) {
  canvas.width = Math.round(size * devicePixelRatio);
  canvas.height = canvas.width;
  return clearCanvas(canvas, size);
}

/** Clear a canvas and return its context in CSS pixels. */
export function clearCanvas(canvas, size) {
  const context = canvas.getContext("2d");
  context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  context.clearRect(0, 0, size, size);
  return context;
}

/** Stroke the path of `trace`, with an outline in the background colour below it. */
function strokeOutlined(context, colour, width, trace) {
  for (const [style, lineWidth] of [
    [cssColour("--card"), 5],
    [colour, width],
  ]) {
    context.strokeStyle = style;
    context.lineWidth = lineWidth;
    context.beginPath();
    trace();
    context.stroke();
  }
}

export function strokeRing(context, [x, y], colour, radius = 8) {
  strokeOutlined(context, colour, 2.5, () => context.arc(x, y, radius, 0, FULL_CIRCLE));
}

export function strokeCross(context, [x, y]) {
  strokeOutlined(context, cssColour("--text"), 2, () => {
    context.moveTo(x - 4, y - 4);
    context.lineTo(x + 4, y + 4);
    context.moveTo(x + 4, y - 4);
    context.lineTo(x - 4, y + 4);
  });
}

/** A filled circle with a letter in it. */
export function fillBadge(context, [x, y], text) {
  context.fillStyle = cssColour("--text");
  context.beginPath();
  context.arc(x, y, 10, 0, FULL_CIRCLE);
  context.fill();
  context.fillStyle = cssColour("--card");
  setFont(context, "bold 12px");
  context.textAlign = "center";
  context.fillText(text, x, y + 4);
  context.textAlign = "start";
}

export function fillOutlinedText(context, text, x, y) {
  context.strokeStyle = cssColour("--card");
  context.lineWidth = 3;
  context.strokeText(text, x, y);
  context.fillText(text, x, y);
}

export function setFont(context, size) {
  context.font = `${size} ${FONT}`;
}

/** Stroke a line through `points`. */
export function strokePath(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => {
    if (i === 0) context.moveTo(x, y);
    else context.lineTo(x, y);
  });
  context.stroke();
}
