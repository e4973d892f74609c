"use strict";
(() => {
  const data = document.getElementById("routes");
  const slider = document.getElementById("route-step");
  if (data && slider) {
    const routes = JSON.parse(data.textContent);
    const cells = document.querySelectorAll("#route-map td");
    const shown = document.getElementById("route-shown");
    const button = document.getElementById("route-play");
    let timer = 0;

    // The colour of the unit, the more certain the stronger, as in the figures.
    const colour = (unit, percent, units) => {
      const certainty = units > 1 ? (percent / 100 - 1 / units) / (1 - 1 / units) : 1;
      const strength = routes.least + (1 - routes.least) * Math.max(0, certainty);
      const hex = routes.colours[unit % routes.colours.length];
      const part = (at) => Math.round(255 - strength * (255 - parseInt(hex.slice(at, at + 2), 16)));
      return `rgb(${part(1)}, ${part(3)}, ${part(5)})`;
    };

    const draw = () => {
      const at = Number(slider.value);
      const layers = routes.units.length;
      cells.forEach((cell, index) => {
        const unit = routes.chosen[at][index];
        const percent = routes.percent[at][index];
        cell.style.background = colour(unit, percent, routes.units[index % layers]);
        cell.firstElementChild.textContent = unit;
        cell.lastElementChild.textContent = `${percent} %`;
      });
      shown.textContent = `step ${routes.steps[at].toLocaleString("en")}`;
    };

    const stop = () => {
      clearInterval(timer);
      timer = 0;
      button.textContent = "play";
    };

    button.addEventListener("click", () => {
      if (timer) return stop();
      if (slider.value === slider.max) slider.value = 0;
      button.textContent = "pause";
      draw();
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        draw();
        if (slider.value === slider.max) stop();
      }, Math.min(500, Math.max(40, 8000 / routes.steps.length)));
    });
    slider.addEventListener("input", () => { if (timer) stop(); draw(); });
    draw();
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
