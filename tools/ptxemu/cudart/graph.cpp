// SPDX-License-Identifier: Apache-2.0
// Graphs from a stream's capture: what the stream is told to do is kept, and done when the graph is
// launched. A call that would wait or allocate ends the capture with an error, as the runtime's
// global capture mode does, whatever mode is asked for. Of one stream at a time, without forks.
#include <dlfcn.h>
#include <algorithm>

#include "json.h"
#include "runtime.h"

namespace ptxemu::cudart {

/// What was captured, and the blocks of the preloaded heap (heap.cpp) that were made meanwhile:
/// they stay for as long as the graph does, like those of torch's pool of a graph.
struct Graph {
  struct Node {
    std::string what;  // JSON
    std::function<cudaError()> run;
  };
  std::vector<Node> nodes;
  std::vector<const void*> blocks;
  std::string described;  // what ptxemu_cudart_graph() returned

  ~Graph();
};

namespace {

constexpr int kStatusNone = 0, kStatusActive = 1, kStatusInvalidated = 2;

template <class F>
F* of_heap(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}

/// A graph, or what is launched of it: both hold the same.
using Handle = std::shared_ptr<Graph>;

void end_pool(Graph& graph) {
  using Visit = void (*)(void*, const void*);
  static const auto end = of_heap<void(Visit, void*)>("ptxemu_heap_pool_end");
  if (!end) return;
  end(
      [](void* blocks, const void* address) {
        static_cast<std::vector<const void*>*>(blocks)->push_back(address);
      },
      &graph.blocks);
}

}  // namespace

Graph::~Graph() {
  static const auto release = of_heap<void(const void*)>("ptxemu_heap_pool_release");
  for (const void* block : blocks) release(block);
}

cudaError enqueue(cudaStream stream, const std::string& what, std::function<cudaError()> run) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (!r.capture.graph) return run();
  if (stream != r.capture.stream) {
    // The default stream waits for all others, so also for the captured one.
    if (stream == nullptr) return refuse_capture(what, kCaptureImplicit);
    return run();
  }
  if (r.capture.spoilt) return fail(kCaptureInvalidated, "the capture has failed before: " + what);
  r.capture.graph->nodes.push_back({what, std::move(run)});
  return kSuccess;
}

cudaError refuse_capture(const std::string& what, int code) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (!r.capture.graph) return kSuccess;
  r.capture.spoilt = true;
  return fail(code, "while a stream is captured: " + what);
}

}  // namespace ptxemu::cudart

using namespace ptxemu::cudart;

CUDART_API cudaError cudaStreamBeginCapture(cudaStream stream, int) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  if (r.capture.graph) return fail(kIllegalState, "a stream is being captured already");
  r.capture = {std::make_shared<Graph>(), stream, false};
  static const auto begin = of_heap<void()>("ptxemu_heap_pool_begin");
  if (begin) begin();
  return kSuccess;
}

CUDART_API cudaError cudaStreamEndCapture(cudaStream stream, Handle** graph) {
  Runtime& r = runtime();
  const std::lock_guard lock(r.mutex);
  *graph = nullptr;
  if (!r.capture.graph || stream != r.capture.stream)
    return fail(kIllegalState, "this stream is not being captured");
  const Capture capture = std::exchange(r.capture, {});
  end_pool(*capture.graph);
  if (capture.spoilt) return fail(kCaptureInvalidated, r.last_finding);
  *graph = new Handle(capture.graph);
  return kSuccess;
}

CUDART_API cudaError cudaStreamIsCapturing(cudaStream stream, int* status) {
  const Runtime& r = runtime();
  const bool captured = r.capture.graph && stream == r.capture.stream;
  *status = !captured ? kStatusNone : r.capture.spoilt ? kStatusInvalidated : kStatusActive;
  return kSuccess;
}

CUDART_API cudaError cudaGraphInstantiate(Handle** executable, Handle* graph, unsigned long long) {
  *executable = new Handle(*graph);
  return kSuccess;
}
CUDART_API cudaError cudaGraphLaunch(Handle* executable, cudaStream stream) {
  const Handle graph = *executable;
  return enqueue(stream, "\"graph\"", [graph]() -> cudaError {
    for (const auto& node : graph->nodes)
      if (const cudaError error = node.run(); error != kSuccess) return error;
    return kSuccess;
  });
}
CUDART_API cudaError cudaGraphDestroy(Handle* graph) {
  delete graph;
  return kSuccess;
}
CUDART_API cudaError cudaGraphExecDestroy(Handle* executable) {
  delete executable;
  return kSuccess;
}

/// What only the stand-in has: the nodes of a graph in their order, as a JSON list; a kernel with
/// all that its launch says but its arguments.
CUDART_API const char* ptxemu_cudart_graph(Handle* graph) {
  (*graph)->described =
      "[" + ptxemu::json_list((*graph)->nodes, [](const auto& node) { return node.what; }) + "]";
  return (*graph)->described.c_str();
}
