// Registers the operators on the CPU key with torch's stable ABI. Everything that a kernel trusts is checked in op_*.h: every
// dtype, device, shape and index, before memory is touched. Schemas and references are in kernels/ops/. One translation unit:
// torch's headers take most of its time.
#include "op_attention.h"
#include "op_chain.h"
#include "op_checks.h"
#include "op_conv.h"
#include "op_encode.h"
#include "op_hold.h"
#include "op_linear.h"
#include "op_lookup.h"
#include "sequence.h"

STABLE_TORCH_LIBRARY_IMPL(qcompile, CPU, m) {
  using Attention = qcompile::WithTorch<&qcompile::attention<qcompile::TorchMemory>>;
  using Convolution = qcompile::WithTorch<&qcompile::conv_tiled<qcompile::TorchMemory>>;
  using Depthwise = qcompile::WithTorch<&qcompile::conv_depthwise<qcompile::TorchMemory>>;
  // the operators with an autograd formula, and the bare ones they compute through
  for (const char* name : {"linear_tiled", "linear_tiled_forward"}) m.impl(name, TORCH_BOX(&qcompile::linear_tiled));
  m.impl("linear_tiled_forward.plain", TORCH_BOX(&qcompile::linear_tiled_plain));
  for (const char* name : {"linear_tiled_split", "linear_tiled_split_forward"})
    m.impl(name, TORCH_BOX(&qcompile::linear_tiled_split));
  for (const char* name : {"attention", "attention_forward"}) m.impl(name, TORCH_BOX(&Attention::call));
  m.impl("linear_chain", TORCH_BOX(&qcompile::linear_chain));
  for (const char* name : {"conv_tiled", "conv_tiled_forward"}) m.impl(name, TORCH_BOX(&Convolution::call));
  for (const char* name : {"conv_depthwise", "conv_depthwise_forward"}) m.impl(name, TORCH_BOX(&Depthwise::call));
  m.impl("embedding_tiled", TORCH_BOX(&qcompile::embedding_tiled));
  m.impl("hold", TORCH_BOX(&qcompile::hold));
  m.impl("sequence", TORCH_BOX(&qcompile::sequence));
  m.impl("sequence_writing", TORCH_BOX(&qcompile::sequence_writing));
  m.impl("quantize_weight", TORCH_BOX(&qcompile::quantize_weight));
  m.impl("dequantize_tiled", TORCH_BOX(&qcompile::dequantize_tiled));
}

// For Python through ctypes: which instruction set runs, and choosing another. Null, or the reason why not.
extern "C" __attribute__((visibility("default"))) const char* qcompile_isa() {
  try {
    return qcompile::kernels().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) const char* qcompile_set_isa(const char* name) {
  thread_local std::string message;
  try {
    qcompile::set_isa(name);
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}
