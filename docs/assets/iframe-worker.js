// Let the search work when the site is opened as files.
//
// Browsers refuse `new Worker(url)` on file: addresses. This class runs the same script in a hidden iframe instead.
// MkDocs Material would otherwise load such a class from a CDN.

class IframeWorker extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.frame = frame.contentWindow;
    this.loaded = new Promise((resolve) => frame.addEventListener("load", resolve, { once: true }));
    this.frame.document.open();
    this.frame.document.write(`<script>postMessage = (data) => parent.postMessage(data, "*")</script><script src="${url}"></script>`);
    this.frame.document.close();
    addEventListener("message", ({ source, data }) => {
      if (source === this.frame) this.dispatchEvent(new MessageEvent("message", { data }));
    });
  }

  postMessage(data) {
    this.loaded.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })));
  }
}

if (location.protocol === "file:") window.Worker = IframeWorker;
