// Draws the plotly figures of a page.
for (const place of document.querySelectorAll(".plotly-figure")) {
  const { data, layout } = JSON.parse(place.querySelector("script").textContent);
  delete layout.width;
  layout.margin = { ...layout.margin, t: Math.max(layout.margin?.t ?? 0, 36) };   // room for the toolbar above the legend
  Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false });
}
