"use strict";
(() => {
  const source = document.getElementById("data");
  if (!source) return;
  const { duration, heard, bars } = JSON.parse(source.textContent);
  const audio = document.querySelector("audio");
  const slider = document.querySelector(".timeline");
  const here = document.querySelector(".here");
  const heads = [...document.querySelectorAll(".head")];
  const buttons = [...document.querySelectorAll("button[data-start]")];

  const clock = (s) => {
    const whole = Math.floor(s);
    const [h, m, r] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
    const two = (n) => String(n).padStart(2, "0");
    return h ? `${h}:${two(m)}:${two(r)}` : `${m}:${two(r)}`;
  };
  const barAt = (t) => {
    let found = -1;
    for (let k = 0; k < bars.length && bars[k][0] <= t + 1e-6; k++) found = k;
    return found;
  };
  let position = 0;
  const show = (t) => {
    position = t;
    const k = barAt(t);
    const inside = k >= 0 && t < bars[k][1] + 1e-6;
    const text = inside ? `${clock(t)}, score ${bars[k][2].toFixed(3)}` : clock(t);
    for (const head of heads) head.style.left = `${(100 * t) / duration}%`;
    here.textContent = t > heard ? `${text}. No sound is kept from ${clock(heard)} on.` : text;
    slider.setAttribute("aria-valuenow", t.toFixed(1));
    slider.setAttribute("aria-valuetext", text);
    buttons.forEach((button, i) => button.closest("tr").classList.toggle("now", inside && i === k));
  };
  const seek = (t) => {
    t = Math.min(Math.max(t, 0), duration);
    if (t < heard) audio.currentTime = t;
    else audio.pause();
    show(t);
  };
  const play = (t) => {
    seek(t);
    if (t < heard) audio.play().catch(() => {});
  };
  const segmentBefore = (t) => {
    const k = barAt(t);
    return k >= 0 && bars[k][0] <= t ? bars[k][0] : null;
  };

  audio.addEventListener("timeupdate", () => { if (!audio.paused) show(audio.currentTime); });
  audio.addEventListener("seeked", () => { if (position < heard) show(audio.currentTime); });
  for (const plot of document.querySelectorAll(".plot")) {
    plot.addEventListener("click", (event) => {
      const box = plot.getBoundingClientRect();
      const t = ((event.clientX - box.left) / box.width) * duration;
      const start = segmentBefore(t);
      play(plot === slider && start !== null ? start : t);
    });
  }
  for (const button of buttons) {
    button.addEventListener("click", () => play(Number(button.dataset.start)));
  }
  slider.addEventListener("keydown", (event) => {
    const k = barAt(position);
    const last = bars.length - 1;
    const start = (i) => (bars.length ? bars[Math.min(Math.max(i, 0), last)][0] : 0);
    const moves = {
      ArrowRight: () => seek(start(k + 1)),
      ArrowUp: () => seek(start(k + 1)),
      ArrowLeft: () => seek(start(k - 1)),
      ArrowDown: () => seek(start(k - 1)),
      Home: () => seek(0),
      End: () => seek(start(last)),
      Enter: () => play(position),
      " ": () => (audio.paused ? play(position) : audio.pause()),
    };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  });
  show(0);
})();
