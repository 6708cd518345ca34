// A fiber: a function on a stack of its own, entered by resume() and left by pause().
//
// boost.context where its headers are found (PYMEND_BOOST_CONTEXT), else ucontext; sanitizer builds use ucontext, which
// needs to be told of every switch.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#ifdef PYMEND_BOOST_CONTEXT
#include <boost/context/fiber.hpp>
#else
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace pymend {
namespace emu {

#ifdef PYMEND_BOOST_CONTEXT

class Fiber {
 public:
  explicit Fiber(std::function<void()> body)
      : inside_([this, body = std::move(body)](boost::context::fiber&& outside) {
          outside_ = std::move(outside);
          body();
          return std::move(outside_);
        }) {}
  void resume() { inside_ = std::move(inside_).resume(); }
  void pause() { outside_ = std::move(outside_).resume(); }

 private:
  boost::context::fiber inside_, outside_;
};

#else

class Fiber {
 public:
  explicit Fiber(std::function<void()> body) : body_(std::move(body)), stack_(STACK_BYTES) {
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_.data();
    inside_.uc_stack.ss_size = stack_.size();
    inside_.uc_link = nullptr;  // enter() switches back itself
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&inside_, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  Fiber(const Fiber&) = delete;

  void resume() {
    void* fake_stack = nullptr;
    start_switch(&fake_stack, stack_.data(), stack_.size());
    swapcontext(&outside_, &inside_);
    finish_switch(fake_stack);
  }
  void pause() {
    void* fake_stack = nullptr;
    start_switch(&fake_stack, caller_stack_, caller_bytes_);
    swapcontext(&inside_, &outside_);
    finish_switch(fake_stack, &caller_stack_, &caller_bytes_);
  }

 private:
  static constexpr size_t STACK_BYTES =
      64 * 1024;  // our kernels use a few hundred bytes; sanitizers several times more

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    finish_switch(nullptr, &self->caller_stack_, &self->caller_bytes_);
    self->body_();
    start_switch(nullptr, self->caller_stack_, self->caller_bytes_);
    setcontext(&self->outside_);
  }

#ifdef __SANITIZE_ADDRESS__
  static void start_switch(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
  }
  static void finish_switch(void* fake_stack, const void** stack = nullptr, size_t* bytes = nullptr) {
    __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  static void finish_switch(void*, const void** = nullptr, size_t* = nullptr) {}
#endif

  std::function<void()> body_;
  std::vector<char> stack_;
  ucontext_t inside_, outside_;
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
};

#endif

}  // namespace emu
}  // namespace pymend
