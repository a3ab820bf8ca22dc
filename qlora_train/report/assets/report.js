"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const byId = (name) => document.getElementById(name);

  // --- theme ---------------------------------------------------------------------------------------------------------

  const THEMES = ["auto", "light", "dark"];
  const themeButton = byId("theme");
  const stored = () => { try { return localStorage.getItem("qlora-train-theme"); } catch { return null; } };
  const store = (theme) => { try { localStorage.setItem("qlora-train-theme", theme); } catch { /* no storage for files */ } };

  function setTheme(theme) {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    themeButton.textContent = `Theme: ${theme}`;
    themeButton.dataset.theme = theme;
  }
  setTheme(THEMES.includes(stored()) ? stored() : "auto");
  themeButton.hidden = false;
  themeButton.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(themeButton.dataset.theme) + 1) % THEMES.length];
    setTheme(next);
    store(next);
    drawCharts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCharts());

  // --- charts --------------------------------------------------------------------------------------------------------

  const charts = JSON.parse(byId("chart-data").textContent);
  const announcer = byId("announcer");
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 5], [14, 4]];
  const COLOURS = 6;
  let plots = [];

  function significant(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  }

  function formatted(value, unit) {
    if (value === null || value === undefined) return "–";
    if (unit === "bytes") return `${(value / 1e9).toPrecision(3)} GB`;
    if (unit === "share") return `${(100 * value).toFixed(1)} %`;
    return significant(value);
  }

  function axisText(value, unit) {
    if (unit === "bytes") return String(+(value / 1e9).toPrecision(4));
    if (unit === "share") return String(+(100 * value).toPrecision(4));
    return String(+value.toPrecision(4));
  }

  /** The last value of a series at or before an index. */
  function latest(values, index) {
    for (let i = index; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
    return null;
  }

  function seriesOptions(series, index, unit) {
    const place = series.run === null ? index : series.run;
    const options = {
      label: series.name,
      stroke: () => colour(`s${place % COLOURS}`),
      width: 2,
      spanGaps: true,
      points: { show: series.values.filter((value) => value !== null).length === 1, size: 7 },
      value: (u, raw, seriesIndex, dataIndex) =>
        formatted(latest(u.data[seriesIndex], dataIndex === null ? u.data[0].length - 1 : dataIndex), unit),
    };
    if (series.run !== null) options.dash = DASHES[series.run % DASHES.length];
    if (series.kind === "points") options.points = { show: true, size: 7, fill: () => colour("paper"), width: 2 };
    if (series.kind === "raw") {
      options.width = 1;
      options.alpha = 0.45;
    }
    return options;
  }

  function levelOptions(level, unit) {
    return {
      label: level.name, stroke: () => colour("muted"), width: 1.5, dash: [5, 5], points: { show: false },
      value: () => formatted(level.value, unit),
    };
  }

  /** The colours of one run's series: a raw line and its running mean share one. */
  function placesOf(chart) {
    let place = -1;
    return chart.series.map((series, i) => (i > 0 && chart.series[i - 1].kind === "raw" ? place : ++place));
  }

  function axis(label, unit, extra) {
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    return {
      label, font, labelFont: font, labelSize: 20, labelGap: 0,
      stroke: () => colour("muted"),
      grid: { stroke: () => colour("rule"), width: 1 },
      ticks: { show: false },
      values: (u, splits) => splits.map((value) => (value === null ? "" : axisText(value, unit))),
      ...extra,
    };
  }

  function tooltip(chart) {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    return {
      hooks: {
        init: (u) => u.over.appendChild(tip),
        setCursor: (u) => {
          const index = u.cursor.idx;
          const isHere = u.cursor.event !== null && u.over.matches(":hover");
          tip.hidden = index === null || !isHere;
          if (tip.hidden) return;
          tip.replaceChildren(...lineElements(chart, u, index));
          const left = u.cursor.left;
          const isRight = left > u.over.clientWidth / 2;
          tip.style.left = isRight ? "" : `${left + 14}px`;
          tip.style.right = isRight ? `${u.over.clientWidth - left + 14}px` : "";
          tip.style.top = "8px";
        },
      },
    };
  }

  function valueLines(chart, u, index) {
    return chart.series
      .map((series, i) => [series, u.data[i + 1][index]])
      .filter(([series, value]) => series.kind !== "raw" && value !== null && value !== undefined)
      .map(([series, value]) => `${series.name} ${formatted(value, chart.unit)}`);
  }

  function lineElements(chart, u, index) {
    const heading = document.createElement("b");
    heading.textContent = `step ${u.data[0][index].toLocaleString("en")}`;
    const lines = valueLines(chart, u, index).map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    });
    return [heading, ...lines];
  }

  function makePlot(element, chart) {
    const isWide = element.closest(".wide") !== null;
    const places = placesOf(chart);
    const label = chart.axis || element.closest("figure").querySelector("h3").textContent.toLowerCase();
    const options = {
      width: element.clientWidth,
      height: isWide ? 320 : 210,
      scales: { x: { time: false } },
      axes: [
        axis("optimizer step", "", { size: 32, space: 60, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5] }),
        axis(label, chart.unit, { size: 62 }),
      ],
      series: [
        { label: "step", value: (u, raw, series, index) => u.data[0][index ?? u.data[0].length - 1].toLocaleString("en") },
        ...chart.series.map((series, i) => seriesOptions(series, places[i], chart.unit)),
        ...chart.levels.map((level) => levelOptions(level, chart.unit)),
      ],
      cursor: { sync: { key: "steps", setSeries: false }, points: { size: 8 } },
      plugins: [tooltip(chart)],
    };
    const levels = chart.levels.map((level) => chart.steps.map(() => level.value));
    element.replaceChildren();
    const plot = new uPlot(options, [chart.steps, ...chart.series.map((series) => series.values), ...levels], element);
    plot.setLegend({ idx: chart.steps.length - 1 });
    plot.over.addEventListener("mouseleave", () => plots.forEach((each) => each.plot.setLegend({ idx: each.plot.data[0].length - 1 })));
    return { plot, element, chart };
  }

  function drawCharts() {
    if (typeof uPlot === "undefined") {
      all(".plot").forEach((element) => { element.textContent = "This browser cannot draw charts; the table below has the numbers."; });
      return;
    }
    plots.forEach(({ plot }) => plot.destroy());
    plots = all(".plot").map((element) => makePlot(element, charts[element.dataset.chart]));
  }

  function moveTo({ plot, chart }, index) {
    const steps = plot.data[0];
    const place = Math.min(Math.max(index, 0), steps.length - 1);
    plots.forEach(({ plot: each }) => each.setCursor({ left: each.valToPos(steps[place], "x"), top: each.over.clientHeight / 2 }));
    announcer.textContent = [`step ${steps[place]}`, ...valueLines(chart, plot, place)].join(", ");
  }

  function onKey(event) {
    const drawn = plots.find(({ element }) => element === event.currentTarget);
    if (!drawn) return;
    const last = drawn.plot.data[0].length - 1;
    const index = drawn.plot.cursor.idx ?? -1;
    const stride = event.shiftKey ? 10 : 1;
    const targets = { ArrowRight: index + stride, ArrowLeft: index < 0 ? last : index - stride, Home: 0, End: last };
    if (event.key in targets) moveTo(drawn, targets[event.key]);
    else if (event.key === "0") drawn.plot.setData(drawn.plot.data, true);
    else if (event.key === "Escape") plots.forEach(({ plot }) => plot.setCursor({ left: -10, top: -10 }));
    else return;
    event.preventDefault();
  }

  drawCharts();
  all(".plot").forEach((element) => element.addEventListener("keydown", onKey));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar changes the height alone
    width = innerWidth;
    plots.forEach(({ plot, element }) => plot.setSize({ width: element.clientWidth, height: plot.height }));
  });

  // --- filters and lists ---------------------------------------------------------------------------------------------

  const PAGE = 12;
  const shown = {};

  function showRows(list, kind, limit) {
    const matching = [...list.children].filter((row) => kind === "" || row.dataset.kind === kind);
    const visible = new Set(matching.slice(0, limit));
    [...list.children].forEach((row) => { row.hidden = !visible.has(row); });
    shown[list.id] = { kind, limit };
    const more = document.querySelector(`[data-more="${list.id}"]`);
    if (more) more.hidden = matching.length <= limit;
    const count = document.querySelector(`[data-count="${list.id}"]`);
    if (count) count.textContent = `${Math.min(limit, matching.length)} of ${matching.length} rows shown`;
  }

  all("[data-filters]").forEach((group) => {
    const list = byId(group.dataset.filters);
    const buttons = all("button", group);
    const limit = list.tagName === "TBODY" ? Infinity : PAGE;
    group.hidden = false;
    buttons.forEach((button) => button.addEventListener("click", () => {
      buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
      showRows(list, button.dataset.show, limit);
    }));
    const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
    showRows(list, pressed.dataset.show, limit);
  });
  all("[data-more]").forEach((button) => button.addEventListener("click", () => {
    const { kind, limit } = shown[button.dataset.more];
    showRows(byId(button.dataset.more), kind, limit + PAGE);
  }));

  // --- copying and navigation ----------------------------------------------------------------------------------------

  all("[data-copy]").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
    });
  });

  const links = new Map(all(".bar nav a").map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id).setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  links.forEach((_, name) => observer.observe(byId(name)));
})();
