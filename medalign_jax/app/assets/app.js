// Waveform and spectrogram move with their player; a click on them goes to that time.
document.addEventListener("timeupdate", (event) => {
  const { currentTime, duration } = event.target;
  const box = event.target.closest(".in-step");
  if (box && duration > 0) box.style.setProperty("--at", currentTime / duration);
}, true);
document.addEventListener("click", (event) => {
  const stack = event.target.closest(".in-step .stack");
  const audio = stack?.parentElement.querySelector("audio");
  if (!audio || !(audio.duration > 0)) return;
  const { left, width } = stack.getBoundingClientRect();
  audio.currentTime = audio.duration * (event.clientX - left) / width;
});
