(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("charts");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const probe = document.createElement("span");
  probe.style.display = "none";
  document.body.append(probe);
  // light-dark() is resolved only where a colour is used.
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const kindColour = { restart: "--dim", rewind: "--bad", spike: "--bad", skipped: "--warn",
    stage: "--c2", branch: "--c4" };
  // Patterns of a line, and of its square in the legend.
  const dashes = [[], [7, 4], [2, 3], [12, 4, 2, 4], [14, 7], [6, 2, 2, 2, 2, 2]];
  const borders = ["solid", "dashed", "dotted", "double", "groove", "ridge"];
  const short = (value) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "G";
    if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
    if (size < 1e-3) return value.toExponential(1);
    return String(+value.toPrecision(5));
  };
  const marks = { hooks: { draw: [(plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const event of data.events) {
      const x = plot.valToPos(event.x, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = colour(kindColour[event.kind] || "--dim");
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }] } };
  let plots = [];
  const width = (box) => Math.max(240, box.clientWidth - 26);
  const height = (box) => (box.classList.contains("wide") ? 320 : 220);
  function draw() {
    for (const [plot] of plots) plot.destroy();
    place.replaceChildren();
    plots = [];
    const kinds = [...new Set(data.events.map((event) => event.kind))];
    if (kinds.length) {
      const legend = document.createElement("p");
      legend.className = "marks chart wide";
      for (const kind of kinds) {
        const line = document.createElement("i");
        line.className = kind;
        legend.append(line, kind);
      }
      place.append(legend);
    }
    data.charts.forEach((chart, number) => {
      const box = document.createElement("div");
      box.className = number ? "chart" : "chart wide";
      const heading = document.createElement("h3");
      const unit = document.createElement("span");
      unit.textContent = chart.unit + (chart.log ? ", logarithmic" : "");
      heading.append(chart.title, unit);
      box.append(heading);
      place.append(box);
      const axis = { stroke: colour("--dim"), grid: { stroke: colour("--grid"), width: 1 },
        ticks: { stroke: colour("--grid"), width: 1 }, font: "12px system-ui, sans-serif" };
      const options = {
        width: width(box), height: height(box), plugins: [marks],
        legend: { markers: { width: 2,
          dash: (_, i) => (i ? borders[chart.series[i - 1].dash % borders.length] : "solid") } },
        cursor: { sync: { key: "steps" }, points: { size: 7 } },
        scales: { x: { time: false }, y: chart.log ? { distr: 3 } : {} },
        axes: [
          { ...axis, values: (_, ticks) => ticks.map((tick) => (tick % 1 ? "" : short(tick))) },
          { ...axis, size: 62, values: (_, ticks) => ticks.map((t) => (t == null ? "" : short(t))) },
        ],
        series: [
          { label: "step", value: (_, value) => (value == null ? "–" : value.toLocaleString("en")) },
          ...chart.series.map((one) => ({
            label: one.label, spanGaps: true,
            // Many points make a band: those of other curves must be seen through it.
            stroke: colour(`--c${one.colour}`), alpha: one.x.length > 400 ? 0.55 : 1,
            width: one.x.length > 400 ? 1 : 2,
            dash: dashes[one.dash % dashes.length], points: { show: one.points, size: 5 },
            value: (_, value) => (value == null ? "–" : short(value)),
          })),
        ],
      };
      const table = uPlot.join(chart.series.map((one) => [one.x, one.y]));
      plots.push([new uPlot(options, table, box), box]);
    });
  }
  draw();
  let waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      for (const [plot, box] of plots) plot.setSize({ width: width(box), height: height(box) });
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const refresh = +document.documentElement.dataset.refresh;
  if (refresh) setTimeout(() => location.reload(), refresh * 1000);
})();
