// Reads a chart's values under the pointer or the finger out of the table behind it. The page is whole without this.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg[data-scale]"), table = figure.querySelector("table"), readout = figure.querySelector(".readout");
  if (!svg || !table || !readout) continue;
  const [low, high, left, right, top, bottom] = svg.dataset.scale.split(" ").map(Number);
  const heads = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
  const rows = [...table.querySelectorAll("tbody tr")].map((row) => [...row.children].map((cell) => cell.textContent));
  const places = [...table.querySelectorAll("tbody tr")].map((row) => Number(row.dataset.x));
  if (!rows.length) continue;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const at = low + (x - left) / (right - left) * (high - low);
    let best = 0;
    places.forEach((place, index) => { if (Math.abs(place - at) < Math.abs(places[best] - at)) best = index; });
    const across = left + (places[best] - low) / ((high - low) || 1) * (right - left);
    cursor.setAttribute("d", `M${across} ${top}V${bottom}`);
    readout.textContent = rows[best].map((text, index) => text && `${heads[index]} ${text}`).filter(Boolean).join("  ·  ");
  };
  const hide = () => { cursor.removeAttribute("d"); readout.textContent = ""; };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
