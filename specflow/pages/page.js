// Draws each chart of the page anew, fitted to its column and with tooltips; where that fails the drawn one stays.
// page.py puts Vega before it, as `window.vegaEmbed`.
const options = {
  mode: "vega-lite",
  renderer: "svg",
  actions: false,
  tooltip: { theme: "page" },
  logLevel: 1,
};

async function draw(chart) {
  const live = document.createElement("div");
  live.className = "live";
  chart.prepend(live);
  try {
    await window.vegaEmbed(live, JSON.parse(chart.querySelector("script").textContent), options);
    chart.querySelector(".drawn").remove();
  } catch (error) {
    live.remove();
    console.error(error);
  }
}

for (const chart of document.querySelectorAll(".chart")) draw(chart);
// A chart inside a closed <details> has no width to fit; it is measured again when it shows.
for (const details of document.querySelectorAll("details"))
  details.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")));
// Paper cannot be unfolded.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
